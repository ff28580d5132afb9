#include "tests/simt/runtime.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <limits>
#include <map>
#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "tests/guarded.h"

// In order.
struct CUgraph_st {
    std::vector<std::function<bool()>> work;
};

struct CUstream_st {
    std::deque<std::function<bool()>> work;
    std::uint64_t done = 0;   // pieces of work that have been taken off
    std::uint64_t added = 0;  // that were ever put on
    bool failed = false;
    std::unique_ptr<CUgraph_st> capture;
    bool spoiled = false;    // the capture
    bool destroyed = false;  // what is on it will be done all the same
};

struct CUevent_st {
    CUstream_st* stream = nullptr;
    std::uint64_t reached = 0;  // the stream's work up to here
};

namespace simt {
namespace {

constexpr std::size_t kAlignment = 256;

using Allocation = std::unique_ptr<kvcast::test::GuardedBytes>;

struct Device {
    std::map<const std::byte*, Allocation> memory;
    std::size_t used = 0;
    std::size_t limit = std::numeric_limits<std::size_t>::max();
    std::set<CUstream_st*> streams;
};

Device& device() {
    static Device d;
    return d;
}

// The first allocation that ends behind `at`.
const kvcast::test::GuardedBytes* behind(const void* at) {
    const auto& memory = device().memory;
    auto next = memory.upper_bound(static_cast<const std::byte*>(at));
    if (next != memory.begin()) {
        const auto& before = *std::prev(next)->second;
        if (before.data() + before.size() > at) return &before;
    }
    return next == memory.end() ? nullptr : next->second.get();
}

void run_until(CUstream_st* stream, std::uint64_t reached) {
    while (stream->done < reached && !stream->work.empty()) {
        const auto work = std::move(stream->work.front());
        stream->work.pop_front();
        ++stream->done;
        if (!work()) stream->failed = true;
    }
}

// Streams that are destroyed, and have done their work.
void drop_destroyed() {
    std::erase_if(device().streams, [](CUstream_st* stream) {
        const bool gone = stream->destroyed && stream->work.empty();
        const std::unique_ptr<CUstream_st> dropped(gone ? stream : nullptr);
        return gone;
    });
}

}  // namespace

int devices() {
    const char* given = std::getenv("SIMT_DEVICES");
    return given == nullptr ? 1 : std::atoi(given);
}

void* allocate(std::size_t bytes) {
    const std::size_t whole = (std::max<std::size_t>(bytes, 1) + kAlignment - 1) / kAlignment * kAlignment;
    if (whole > device().limit - std::min(device().used, device().limit)) return nullptr;
    auto memory = std::make_unique<kvcast::test::GuardedBytes>(whole);
    std::byte* const at = memory->data();
    device().used += whole;
    device().memory[at] = std::move(memory);
    return at;
}

bool release(void* at) {
    drain_all();
    const auto found = device().memory.find(static_cast<const std::byte*>(at));
    if (found == device().memory.end()) return false;
    device().used -= found->second->size();
    device().memory.erase(found);
    return true;
}

void set_device_limit(std::size_t bytes) {
    device().limit = bytes;
}

bool on_device(const void* at, std::size_t bytes) {
    const auto* memory = behind(at);
    const auto* begin = static_cast<const std::byte*>(at);
    return memory != nullptr && memory->data() <= begin && begin + bytes <= memory->data() + memory->size();
}

bool on_host(const void* at, std::size_t bytes) {
    const auto* memory = behind(at);
    return memory == nullptr || static_cast<const std::byte*>(at) + bytes <= memory->data();
}

void enqueue(CUstream_st* stream, std::function<bool()> work) {
    if (stream->capture != nullptr) {
        stream->capture->work.push_back(std::move(work));
        return;
    }
    stream->work.push_back(std::move(work));
    ++stream->added;
}

bool drain(CUstream_st* stream) {
    run_until(stream, stream->added);
    return !std::exchange(stream->failed, false);
}

void drain_all() {
    for (CUstream_st* stream : device().streams) run_until(stream, stream->added);
    drop_destroyed();
}

bool begin_capture(CUstream_st* stream) {
    if (stream->capture != nullptr) return false;
    stream->capture = std::make_unique<CUgraph_st>();
    stream->spoiled = false;
    return true;
}

CUgraph_st* end_capture(CUstream_st* stream) {
    auto graph = std::exchange(stream->capture, nullptr);
    return stream->spoiled ? nullptr : graph.release();
}

bool outside_capture(CUstream_st* stream) {
    stream->spoiled = true;
    return stream->capture == nullptr;
}

bool outside_capture() {
    bool outside = true;
    for (CUstream_st* stream : device().streams) outside = outside_capture(stream) && outside;
    return outside;
}

void launch(const CUgraph_st* graph, CUstream_st* stream) {
    for (const auto& work : graph->work) enqueue(stream, work);
}

CUgraph_st* copy(const CUgraph_st* graph) {
    return new CUgraph_st(*graph);
}

void destroy(CUgraph_st* graph) {
    delete graph;
}

CUstream_st* make_stream() {
    return *device().streams.insert(new CUstream_st).first;
}

void destroy(CUstream_st* stream) {
    stream->destroyed = true;
    if (stream->work.empty()) drop_destroyed();
}

CUevent_st* make_event() {
    return new CUevent_st;
}

void destroy(CUevent_st* event) {
    delete event;
}

void record(CUevent_st* event, CUstream_st* stream) {
    event->stream = stream;
    event->reached = stream->added;
}

void wait(CUstream_st* stream, CUevent_st* event) {
    if (event->stream == nullptr) return;
    enqueue(stream, [other = event->stream, reached = event->reached] {
        if (device().streams.contains(other)) run_until(other, reached);
        return true;
    });
}

bool wait(CUevent_st* event) {
    if (event->stream == nullptr || !device().streams.contains(event->stream)) return true;
    run_until(event->stream, event->reached);
    return !event->stream->failed;
}

}  // namespace simt
