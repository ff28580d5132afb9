// The CUDA runtime's part of the emulator: memory, streams and events, behind CUDA's names
// (tests/simt/include/cuda_runtime.h).
//
// What is put on a stream happens as late as it may: when somebody waits for it, or frees memory; destroying
// the stream does not wait. A program that reuses a buffer too early, or reads what it did not wait for, gets
// wrong bytes every time. Work on the null stream happens at once. Device memory is memory of the host
// between guard pages; a copy whose pointers do not lie where its direction says is refused.
//
// A stream that is captured collects its work in a graph. Until it ends, what CUDA forbids then is refused
// and spoils the capture, as in CUDA's global mode: allocating and freeing, waiting, the null stream. Events
// on such a stream are refused, too.
#pragma once

#include <cstddef>
#include <functional>

struct CUgraph_st;
struct CUstream_st;
struct CUevent_st;

namespace simt {

// One device, or as many as the environment variable SIMT_DEVICES says.
int devices();

// Memory of the device at a multiple of 256; null where there is none left: device_limit() bytes, for tests.
void* allocate(std::size_t bytes);
bool release(void* at);  // false where it was not allocated
void set_device_limit(std::size_t bytes);

// Whether all of the bytes lie in one allocation, or none of them does in any.
bool on_device(const void* at, std::size_t bytes);
bool on_host(const void* at, std::size_t bytes);

// Appends to a stream. `work` says whether it succeeded.
void enqueue(CUstream_st* stream, std::function<bool()> work);
// Runs a stream to its end; whether all of it succeeded since the last time.
bool drain(CUstream_st* stream);
void drain_all();

// False where the stream is being captured already.
bool begin_capture(CUstream_st* stream);
// What has come since; null where that was spoiled, or has not begun.
CUgraph_st* end_capture(CUstream_st* stream);
// True where no stream, or this one not, is captured; else captures are spoiled by what is asked for.
bool outside_capture();
bool outside_capture(CUstream_st* stream);
// A graph's work at the end of a stream, as often as one likes.
void launch(const CUgraph_st* graph, CUstream_st* stream);
CUgraph_st* copy(const CUgraph_st* graph);
void destroy(CUgraph_st* graph);

CUstream_st* make_stream();
void destroy(CUstream_st* stream);
CUevent_st* make_event();
void destroy(CUevent_st* event);
void record(CUevent_st* event, CUstream_st* stream);
void wait(CUstream_st* stream, CUevent_st* event);
bool wait(CUevent_st* event);

}  // namespace simt
