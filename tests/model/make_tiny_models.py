#!/usr/bin/env python3
"""Writes tests/model/tiny: small random models of every supported architecture, and what Hugging Face computes.

Each folder holds config.json, weights, and expected.safetensors (fp32): token_ids [T], logits [T, vocabulary], k and v
[layers, T, kv_heads, head_dim] (k after RoPE), greedy [16]; dk and dv are gradients of sum_i weights[i] log p(targets[i]) with
respect to the KV of the first T - 8 tokens, k before RoPE. Metadata `first_position` is where token 0 stands.

With --real MODEL_DIR SAMPLE it writes smollm2_expected.json instead: logits and greedy tokens of the model that
data/get-model makes, after the token ids of a KV sample.

Needs: pip install torch transformers
"""
import argparse
import json
import pathlib

import torch
import transformers
from safetensors.torch import load_file, save_file

HERE = pathlib.Path(__file__).resolve().parent
TOKENS, CONTINUATION, GREEDY = 24, 8, 16
SHAPE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             vocab_size=64, max_position_embeddings=2048, rms_norm_eps=1e-5, bos_token_id=None, eos_token_id=None)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=256, rope_theta=10000.0)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=128, rope_theta=10000.0)
MODELS = {
    "llama": dict(type="Llama", position=0, dtype=torch.float32,
                  options=dict(tie_word_embeddings=True), old_rope=dict(rope_theta=5000.0)),
    "llama-sharded-bias": dict(type="Llama", position=3, dtype=torch.float16, shard="20KB",
                               options=dict(tie_word_embeddings=False, attention_bias=True, mlp_bias=True)),
    "llama-linear": dict(type="Llama", position=500, dtype=torch.bfloat16,
                         options=dict(tie_word_embeddings=True),
                         old_rope=dict(rope_theta=10000.0, rope_scaling=dict(type="linear", factor=4.0))),
    "llama3": dict(type="Llama", position=700, dtype=torch.bfloat16,
                   options=dict(tie_word_embeddings=True, rope_parameters=LLAMA3)),
    "llama-yarn": dict(type="Llama", position=300, dtype=torch.bfloat16,
                       options=dict(tie_word_embeddings=True, rope_parameters=YARN)),
    "llama-yarn-mscale": dict(type="Llama", position=300, dtype=torch.bfloat16,
                              options=dict(tie_word_embeddings=True, rope_parameters=dict(
                                  YARN, mscale=0.9, mscale_all_dim=0.5, beta_fast=16, beta_slow=2))),
    "mistral": dict(type="Mistral", position=0, dtype=torch.bfloat16,
                    options=dict(tie_word_embeddings=False, sliding_window=40, head_dim=8)),
    "qwen2": dict(type="Qwen2", position=10, dtype=torch.bfloat16, options=dict(tie_word_embeddings=True)),
    "qwen3": dict(type="Qwen3", position=0, dtype=torch.bfloat16,
                  options=dict(tie_word_embeddings=True, head_dim=12)),
}


def randomise(model):
    """Weights large enough that attention is far from uniform and every bias and norm matters."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn_like(p)
            p.copy_(1 + 0.2 * noise if "norm" in name else noise * (0.5 if "bias" in name else 0.25))


def write_model(folder, spec):
    config = getattr(transformers, spec["type"] + "Config")(**SHAPE, **spec["options"])
    model = getattr(transformers, spec["type"] + "ForCausalLM")(config)
    randomise(model)
    model.to(spec["dtype"]).save_pretrained(folder, max_shard_size=spec.get("shard", "1GB"))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if "old_rope" in spec:
        path = folder / "config.json"
        values = json.loads(path.read_text())
        del values["rope_parameters"]
        path.write_text(json.dumps({**values, **spec["old_rope"]}, indent=2, sort_keys=True) + "\n")


def load(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval().requires_grad_(False)


def stacked(cache):
    """k and v [layers, T, kv_heads, head_dim] of a cache."""
    return [torch.stack([getattr(layer, kind)[0] for layer in cache.layers]).transpose(1, 2).contiguous()
            for kind in ("keys", "values")]


def cache_of(k, v):
    cache = transformers.DynamicCache()
    for layer in range(k.shape[0]):
        cache.update(k[layer].transpose(0, 1)[None], v[layer].transpose(0, 1)[None], layer)
    return cache


def run(model, ids, first, k=None, v=None):
    positions = torch.arange(first, first + len(ids))[None]
    cache = None if k is None else cache_of(k, v)
    return model(ids[None], past_key_values=cache, position_ids=positions, use_cache=True)


def greedy(model, ids, first, count):
    out = []
    with torch.no_grad():
        for _ in range(count):
            sequence = torch.cat([ids, torch.tensor(out, dtype=torch.long)])
            out.append(int(run(model, sequence, first).logits[0, -1].argmax()))
    return torch.tensor(out, dtype=torch.int32)


def turned(model, k, first, sign):
    """k [layers, T, heads, head_dim] rotated by sign x position, without any attention factor."""
    frequencies = model.model.rotary_emb.inv_freq
    angles = sign * torch.outer(torch.arange(first, first + k.shape[1]).float(), frequencies)
    c, s = angles.cos()[:, None], angles.sin()[:, None]
    a, b = k.chunk(2, -1)
    return torch.cat([a * c - b * s, b * c + a * s], -1)


def gradients(model, ids, first, k, v):
    context = len(ids) - CONTINUATION
    plain = turned(model, k[:, :context], first, -1).requires_grad_(True)
    values = v[:, :context].clone().requires_grad_(True)
    out = run(model, ids[context:], first + context, turned(model, plain, first, 1), values)
    targets = torch.randint(0, SHAPE["vocab_size"], (CONTINUATION,))
    weights = torch.randn(CONTINUATION)
    log_p = out.logits[0].log_softmax(-1).gather(1, targets[:, None])[:, 0]
    dk, dv = torch.autograd.grad((log_p * weights).sum(), [plain, values])
    return dict(dk=dk, dv=dv, targets=targets.int(), weights=weights)


def expected(folder, first):
    model = load(folder)
    ids = torch.randint(0, SHAPE["vocab_size"], (TOKENS,))
    with torch.no_grad():
        out = run(model, ids, first)
    k, v = stacked(out.past_key_values)
    tensors = dict(token_ids=ids.int(), logits=out.logits[0], k=k, v=v, greedy=greedy(model, ids, first, GREEDY))
    tensors.update(gradients(model, ids, first, k, v))
    tensors = {name: t.contiguous() for name, t in tensors.items()}
    save_file(tensors, folder / "expected.safetensors", metadata={"first_position": str(first)})


def write_real(folder, sample):
    """Every 192nd logit after the sample's tokens is enough to tell one model from another."""
    model = load(folder)
    ids = load_file(sample)["token_ids"].long()
    with torch.no_grad():
        logits = run(model, ids, 0).logits[0, -1]
    chosen = list(range(0, len(logits), 192))
    out = dict(origin="transformers " + transformers.__version__ + ", fp32", logit_ids=chosen,
               logits=[round(float(logits[i]), 5) for i in chosen], greedy=greedy(model, ids, 0, 64).tolist())
    (HERE / "smollm2_expected.json").write_text(json.dumps(out) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", nargs=2, metavar=("MODEL_DIR", "SAMPLE"))
    arguments = parser.parse_args()
    if arguments.real:
        return write_real(*arguments.real)
    for seed, (name, spec) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        folder = HERE / "tiny" / name
        folder.mkdir(parents=True, exist_ok=True)
        write_model(folder, spec)
        expected(folder, spec["position"])


if __name__ == "__main__":
    main()
