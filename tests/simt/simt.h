// A small SIMT machine: CUDA kernels as host C++.
//
// Kernel sources are compiled unchanged by a host compiler that finds tests/simt/include/cuda_runtime.h
// before CUDA's own. The threads of a block are fibres on one operating-system thread; they switch at warp
// and block primitives only, blocks run one after another, and a launch has finished when it returns. What
// comes out is what a GPU computes; nothing is said about speed.
//
// What it catches, as a failed launch with a sentence that names the threads:
// - a shuffle, ballot, reduction or __syncwarp that a lane of its mask never reaches, reaches with another
//   mask, or calls without being in the mask; a shuffle from a lane that takes no part;
// - a block barrier that a thread of the block never reaches, or has returned before; a barrier for some of a
//   block's threads that too few of them reach, or that they expect in different numbers;
// - shared memory that is read before it is written: it holds a pattern when a block starts, not zeros;
// - missing barriers, mostly: threads run in the order that the Schedule says, so that a kernel without the
//   barrier it needs gives other results under another schedule.
// And as a fault that ends the process: an access outside a Guarded array or outside dynamic shared memory.
//
// And built with the thread sanitizer: races, in shared and in global memory, between threads of a block,
// under any schedule, where a barrier is missing or where a shuffle, a vote or an atomic is taken for one
// (races.h).
//
// What it does not model: memory ordering otherwise (without that sanitizer a shuffle orders memory as a
// barrier does), races between blocks, alignment (the undefined-behaviour sanitizer does that), limits of
// registers, and independent progress between primitives.
//
// One launch at a time in a process.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "tests/guarded.h"

namespace simt {

using kvcast::test::Edge;
using kvcast::test::Guarded;
using kvcast::test::GuardedBytes;

inline constexpr unsigned kWarp = 32;

struct Extent {
    unsigned x = 1, y = 1, z = 1;

    unsigned count() const { return x * y * z; }
};

// In which order runnable threads get their turn, and blocks theirs.
enum class Schedule : std::uint8_t { kForwards, kBackwards, kShuffled };

// For launches from now on.
void set_schedule(Schedule schedule);

// Runs `thread` once per thread of the grid. Returns what went wrong, if anything did; the launch then stops
// where it is. Most threads in a block: 1024; most dynamic shared memory: 48 KiB, or what the kernel has been
// allowed, at most kMostOptIn.
inline constexpr std::size_t kMostOptIn = std::size_t{227} << 10;
std::optional<std::string> launch(Extent grid, Extent block, std::size_t shared_bytes,
                                  const std::function<void()>& thread, const void* kernel = nullptr);

// What a device says that a block may have at most: kMostOptIn, unless it is a smaller one.
std::size_t most_shared();
void set_most_shared(std::size_t bytes);

// How many multiprocessors a device says that it has: kMultiprocessors, unless it has fewer.
inline constexpr unsigned kMultiprocessors = 4;
unsigned multiprocessors();
void set_multiprocessors(unsigned count);

// Lets a kernel be launched with so much dynamic shared memory. False beyond kMostOptIn.
bool allow_shared(const void* kernel, std::size_t bytes);

// The same where a kernel is launched through the runtime's names: a failure is kept until it is taken.
void record_failure(std::string message);
std::string take_failure();  // empty where there is none

// ---- what kernels see, through cuda_runtime.h

struct Coordinates {
    unsigned x, y, z;
};
extern Coordinates threadIdx, blockIdx, blockDim, gridDim;

std::byte* dynamic_shared();

// cp.async, as late as may be: a copy is made when the thread waits for its group. A thread that ends with
// open copies ends the launch as a failure.
void copy_async(void* to, const void* from, std::size_t bytes);
void commit_copies();
void wait_copies(std::size_t open_groups);

enum class Primitive : std::uint8_t {
    kShuffle,
    kBallot,
    kAll,
    kAny,
    kReduceAdd,
    kReduceMax,
    kReduceMin,
    kReduceOr,
    kMultiply,
    kSyncWarp,
    kSyncBlock,
    kSyncBlockOr,
    kSyncBlockAnd,
    kSyncBlockCount,
    kSyncSome,
    kSyncMemory,
};

struct Place {
    const char* file;
    int line;
};

// Waits for the other lanes of the mask; `source` is the lane that a shuffle reads.
std::uint64_t meet_warp(Primitive primitive, unsigned mask, std::uint64_t value, unsigned source,
                        Place place);
std::uint64_t meet_block(Primitive primitive, std::uint64_t value, Place place);

// The tensor cores' product of 8-bit integers, PTX's mma.sync m16n8k32, with its fragments.
void multiply_matrices(std::int32_t (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                       bool signed_a, bool signed_b, Place place);

// One of the block's barriers, for `threads` of its threads: PTX ISA, "barrier.sync".
inline constexpr unsigned kBarriers = 16;
void meet_some(unsigned barrier, unsigned threads, Place place);
// The same without waiting: "barrier.arrive".
void arrive(unsigned barrier, unsigned threads);

// A barrier in 8 bytes of shared memory, whose phases are over when `count` threads have arrived: PTX ISA,
// "mbarrier". `at` is what a kernel knows it by.
inline constexpr std::size_t kMemoryBarrierBytes = 8;
void make_barrier(void* at, unsigned count);
void arrive_at(void* at);
// Waits until a phase of this parity is over.
void wait_at(void* at, unsigned parity, Place place);

// Ends the launch with a failure of the calling thread. The message outlives the launch.
[[noreturn]] void fail(const char* message);

unsigned lane();
unsigned warp();  // of the block

}  // namespace simt
