"""As much of vLLM's interface as a connector is written against, so that its tests need no vLLM. tests/vllm/run has the
connector loaded by vLLM itself."""
