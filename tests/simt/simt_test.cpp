// The emulator computes what CUDA's programming guide says, and catches kernels that misuse a primitive.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cuda_runtime.h>
#include <signal.h>

#include <array>
#include <numeric>
#include <thread>
#include <vector>

#include "tests/simt/orders.h"
#include "tests/simt/races.h"

namespace {

using simt::Edge;
using simt::Guarded;
using simt::Schedule;
using testing::HasSubstr;
using testing::Optional;

constexpr unsigned kAll = 0xffffffffu;

// Every test under every order of threads.
class Simt : public testing::TestWithParam<Schedule> {
  protected:
    void SetUp() override { simt::set_schedule(GetParam()); }
    void TearDown() override { simt::set_schedule(Schedule::kForwards); }

    template <typename Kernel>
    static std::optional<std::string> run(unsigned blocks, unsigned threads, Kernel kernel,
                                          std::size_t shared = 0) {
        return simt::launch({blocks, 1, 1}, {threads, 1, 1}, shared, kernel);
    }
};

std::vector<int> lanes(int (*of_lane)(int), int count = 32) {
    std::vector<int> out;
    for (int i = 0; i < count; ++i) out.push_back(of_lane(i));
    return out;
}

TEST_P(Simt, NumbersThreadsAndBlocks) {
    std::vector<int> seen(3 * 2 * 4 * 5, -1);
    const auto failed = simt::launch({3, 2, 1}, {4, 5, 1}, 0, [&] {
        const unsigned block = blockIdx.x + gridDim.x * blockIdx.y;
        const unsigned thread = threadIdx.x + blockDim.x * threadIdx.y;
        seen[block * 20 + thread] = static_cast<int>(block * 20 + thread);
    });
    EXPECT_EQ(failed, std::nullopt);
    std::vector<int> wanted(seen.size());
    std::iota(wanted.begin(), wanted.end(), 0);
    EXPECT_EQ(seen, wanted);
}

TEST_P(Simt, ShufflesFromAnyLane) {
    std::vector<int> idx(32), up(32), down(32), exchanged(32), narrow(32), narrow_up(32), narrow_down(32);
    const auto failed = run(1, 32, [&] {
        const int i = static_cast<int>(threadIdx.x);
        idx[i] = __shfl_sync(kAll, 10 * i, (i + 5) % 32);
        up[i] = __shfl_up_sync(kAll, i, 3);
        down[i] = __shfl_down_sync(kAll, i, 3);
        exchanged[i] = __shfl_xor_sync(kAll, i, 17);
        narrow[i] = __shfl_sync(kAll, i, 9, 8);
        narrow_up[i] = __shfl_up_sync(kAll, i, 1, 8);
        narrow_down[i] = __shfl_down_sync(kAll, i, 1, 8);
    });
    EXPECT_EQ(failed, std::nullopt);
    EXPECT_EQ(idx, lanes([](int i) { return 10 * ((i + 5) % 32); }));
    EXPECT_EQ(up, lanes([](int i) { return i < 3 ? i : i - 3; }));
    EXPECT_EQ(down, lanes([](int i) { return i > 28 ? i : i + 3; }));
    EXPECT_EQ(exchanged, lanes([](int i) { return i ^ 17; }));
    EXPECT_EQ(narrow, lanes([](int i) { return i / 8 * 8 + 1; }));
    EXPECT_EQ(narrow_up, lanes([](int i) { return i % 8 == 0 ? i : i - 1; }));
    EXPECT_EQ(narrow_down, lanes([](int i) { return i % 8 == 7 ? i : i + 1; }));
}

TEST_P(Simt, ShufflesValuesOfEightBytes) {
    std::vector<double> out(32);
    EXPECT_EQ(run(1, 32, [&] { out[threadIdx.x] = __shfl_sync(kAll, 0.5 + threadIdx.x, 31); }), std::nullopt);
    EXPECT_EQ(out, std::vector<double>(32, 31.5));
}

TEST_P(Simt, VotesAndReduces) {
    struct Got {
        unsigned ballot, sum, most, least, bits;
        int all, any;
    };
    std::vector<Got> got(32);
    const auto failed = run(1, 32, [&] {
        const unsigned i = threadIdx.x;
        got[i] = {__ballot_sync(kAll, i % 3 == 0), __reduce_add_sync(kAll, i),
                  __reduce_max_sync(kAll, i + 1),  __reduce_min_sync(kAll, i + 1),
                  __reduce_or_sync(kAll, i & 6u),  __all_sync(kAll, i < 31),
                  __any_sync(kAll, i == 31)};
    });
    EXPECT_EQ(failed, std::nullopt);
    for (const Got& g : got) {
        EXPECT_EQ(g.ballot, 0x49249249u);
        EXPECT_EQ(g.sum, 496u);
        EXPECT_EQ(g.most, 32u);
        EXPECT_EQ(g.least, 1u);
        EXPECT_EQ(g.bits, 6u);
        EXPECT_EQ(g.all, 0);
        EXPECT_EQ(g.any, 1);
    }
}

// Matrices through fragments, as PTX lays them out.
TEST_P(Simt, MultipliesMatricesAsTheTensorCoresDo) {
    for (const bool signed_a : {false, true}) {
        for (const bool signed_b : {false, true}) {
            std::array<std::array<std::uint8_t, 32>, 16> a;
            std::array<std::array<std::uint8_t, 8>, 32> b;
            unsigned n = 1;
            const auto next = [&] { return static_cast<std::uint8_t>((n *= 77777) >> 13); };
            for (auto& row : a) std::generate(row.begin(), row.end(), next);
            for (auto& row : b) std::generate(row.begin(), row.end(), next);
            std::array<std::array<int, 8>, 16> wanted;
            for (unsigned r = 0; r < 16; ++r) {
                for (unsigned c = 0; c < 8; ++c) {
                    wanted[r][c] = 5;
                    for (unsigned k = 0; k < 32; ++k) {
                        wanted[r][c] += (signed_a ? static_cast<std::int8_t>(a[r][k]) : int{a[r][k]}) *
                                        (signed_b ? static_cast<std::int8_t>(b[k][c]) : int{b[k][c]});
                    }
                }
            }
            std::array<std::array<std::array<int, 8>, 16>, 2> of_warps = {};
            const auto failed = run(1, 64, [&] {  // both warps do the same
                auto& got = of_warps[threadIdx.x / 32];
                const unsigned g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
                std::uint32_t left[4] = {}, right[2] = {};
                std::int32_t sums[4] = {5, 5, 5, 5};
                for (unsigned byte = 0; byte < 4; ++byte) {
                    for (unsigned r = 0; r < 4; ++r)
                        left[r] |= std::uint32_t{a[g + r % 2 * 8][r / 2 * 16 + t * 4 + byte]} << 8 * byte;
                    for (unsigned r = 0; r < 2; ++r)
                        right[r] |= std::uint32_t{b[r * 16 + t * 4 + byte][g]} << 8 * byte;
                }
                simt_mma_m16n8k32(sums, left, right, signed_a, signed_b);
                for (unsigned i = 0; i < 4; ++i) got[g + i / 2 * 8][t * 2 + i % 2] = sums[i];
            });
            EXPECT_EQ(failed, std::nullopt);
            for (const auto& got : of_warps) EXPECT_EQ(got, wanted);
        }
    }
}

TEST_P(Simt, WarpsAndHalvesOfWarpsMeetApart) {
    std::vector<unsigned> out(96);
    const auto failed = run(1, 96, [&] {
        const unsigned lane = threadIdx.x % 32;
        const unsigned mask = lane < 16 ? 0xffffu : 0xffff0000u;
        if (threadIdx.x / 32 != 1) out[threadIdx.x] = __ballot_sync(mask, lane % 2 == 0);
    });
    EXPECT_EQ(failed, std::nullopt);
    EXPECT_EQ(out[0], 0x5555u);
    EXPECT_EQ(out[31], 0x55550000u);
    EXPECT_EQ(out[32], 0u);
    EXPECT_EQ(out[64], 0x5555u);
}

TEST_P(Simt, BlockBarriersOrderSharedMemory) {
    std::vector<int> out(2 * 100), votes(2 * 100);
    const auto failed = run(2, 100, [&] {
        __shared__ int cells[100];
        const unsigned i = threadIdx.x;
        cells[i] = static_cast<int>(i + blockIdx.x);
        __syncthreads();
        out[blockIdx.x * 100 + i] = cells[99 - i];
        const int count = __syncthreads_count(i < 7);
        const int any = __syncthreads_or(i == 99);
        const int all = __syncthreads_and(i != 50);
        votes[blockIdx.x * 100 + i] = count * 100 + any * 10 + all;
    });
    EXPECT_EQ(failed, std::nullopt);
    for (int b = 0; b < 2; ++b) {
        for (int i = 0; i < 100; ++i) EXPECT_EQ(out[b * 100 + i], 99 - i + b);
    }
    EXPECT_EQ(votes, std::vector<int>(200, 710));
}

TEST_P(Simt, AtomicsCountEveryThread) {
    unsigned sum = 0, most = 0, least = 1000, bits = 0, kept = ~0u, last = 0, swapped = 0;
    const auto failed = run(3, 64, [&] {
        const unsigned i = blockIdx.x * 64 + threadIdx.x;
        atomicAdd(&sum, i);
        atomicMax(&most, i);
        atomicMin(&least, i + 5);
        atomicOr(&bits, 1u << (i % 20));
        atomicAnd(&kept, ~(1u << (i % 20)));
        atomicExch(&last, 7u);
        atomicCAS(&swapped, i, i + 1);
    });
    EXPECT_EQ(failed, std::nullopt);
    EXPECT_EQ(sum, 191u * 192 / 2);
    EXPECT_EQ(most, 191u);
    EXPECT_EQ(least, 5u);
    EXPECT_EQ(bits, 0xfffffu);
    EXPECT_EQ(kept, ~0xfffffu);
    EXPECT_EQ(last, 7u);
    EXPECT_GE(swapped, 1u);
}

TEST_P(Simt, BytesArePickedAndWordsAreJoinedAsTheProgrammingGuideSays) {
    EXPECT_EQ(__byte_perm(0x33221100, 0x77665544, 0x7531), 0x77553311u);
    EXPECT_EQ(__byte_perm(0x33221100, 0x77665544, 0x0246), 0x00224466u);
    EXPECT_EQ(__funnelshift_l(0x80000001, 0x00000001, 1), 3u);
    EXPECT_EQ(__funnelshift_l(0x12345678, 0x9abcdef0, 0), 0x9abcdef0u);
}

// The latest moment that cp.async may take is when its group is waited for.
TEST_P(Simt, AsynchronousCopiesAreMadeWhenTheirGroupIsWaitedFor) {
    const std::array<std::uint32_t, 4> from = {1, 2, 3, 4};
    std::array<std::uint32_t, 4> first = {}, second = {};
    std::vector<std::uint32_t> seen;
    const auto failed = run(1, 1, [&] {
        simt_copy_async(first.data(), from.data(), 16);
        simt_commit_copies();
        simt_copy_async(second.data(), from.data(), 16);
        simt_commit_copies();
        seen.push_back(first[0]);
        simt_wait_copies(1);
        seen.push_back(first[3]);
        seen.push_back(second[3]);
        simt_wait_copies(0);
        seen.push_back(second[3]);
    });
    EXPECT_EQ(failed, std::nullopt);
    EXPECT_EQ(seen, (std::vector<std::uint32_t>{0, 4, 0, 4}));
}

TEST_P(Simt, CopiesThatNobodyWaitsForAreAFailure) {
    const std::uint64_t from = 1;
    std::array<std::uint64_t, 2> to = {};
    const auto failed = run(1, 2, [&] {
        simt_copy_async(&to[threadIdx.x], &from, 8);
        simt_commit_copies();
        if (threadIdx.x == 0) simt_wait_copies(0);
    });
    EXPECT_THAT(failed, Optional(HasSubstr("without having waited for its copies")));
}

void does_nothing(int) {}

TEST(SimtLaunches, MayHaveMoreThan48KibOfSharedMemoryWhereTheKernelIsAllowedTo) {
    cudaLaunchConfig_t config;
    config.dynamicSmemBytes = 100 << 10;
    EXPECT_EQ(cudaLaunchKernelEx(&config, does_nothing, 1), cudaErrorLaunchFailure);
    EXPECT_THAT(simt::take_failure(), HasSubstr("bytes of shared memory"));
    EXPECT_EQ(cudaFuncSetAttribute(does_nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, 228 << 10),
              cudaErrorInvalidValue);
    EXPECT_EQ(cudaFuncSetAttribute(does_nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, 100 << 10),
              cudaSuccess);
    EXPECT_EQ(cudaLaunchKernelEx(&config, does_nothing, 1), cudaSuccess);
}

TEST_P(Simt, DynamicSharedMemoryHasTheSizeOfTheLaunch) {
    std::vector<int> out(40);
    const auto failed = run(
        1, 40,
        [&] {
            auto* cells = reinterpret_cast<std::uint8_t*>(simt::dynamic_shared());
            cells[threadIdx.x] = static_cast<std::uint8_t>(threadIdx.x);
            __syncthreads();
            out[threadIdx.x] = cells[(threadIdx.x + 1) % 40];
        },
        40);
    EXPECT_EQ(failed, std::nullopt);
    EXPECT_EQ(out[39], 0);
    EXPECT_EQ(out[0], 1);
}

TEST_P(Simt, BitsAreCountedAsOnTheDevice) {
    EXPECT_EQ(__popc(0xf0f0u), 8);
    EXPECT_EQ(__popcll(~0ull), 64);
    EXPECT_EQ(__clz(1), 31);
    EXPECT_EQ(__clz(0), 32);
    EXPECT_EQ(__ffs(0), 0);
    EXPECT_EQ(__ffs(8), 4);
}

// ---- misuse

TEST_P(Simt, CatchesALaneThatMissesAShuffle) {
    const auto failed = run(1, 32, [] {
        if (threadIdx.x != 9) __shfl_sync(kAll, 1, 0);
    });
    EXPECT_THAT(failed, Optional(HasSubstr("__shfl_sync")));
    EXPECT_THAT(failed, Optional(HasSubstr("thread 9 has returned")));
}

TEST_P(Simt, CatchesALaneThatMissesABallot) {
    const auto failed = run(1, 64, [] {
        if (threadIdx.x != 40) __ballot_sync(kAll, 1);
    });
    EXPECT_THAT(failed, Optional(HasSubstr("__ballot_sync")));
    EXPECT_THAT(failed, Optional(HasSubstr("thread 40 has returned")));
}

TEST_P(Simt, CatchesALaneThatMissesAVote) {
    EXPECT_THAT(run(1, 32,
                    [] {
                        if (threadIdx.x < 31) __all_sync(kAll, 1);
                    }),
                Optional(HasSubstr("__all_sync")));
    EXPECT_THAT(run(1, 32,
                    [] {
                        if (threadIdx.x < 31) __any_sync(kAll, 1);
                    }),
                Optional(HasSubstr("__any_sync")));
}

TEST_P(Simt, CatchesALaneThatMissesAReduction) {
    EXPECT_THAT(run(1, 32,
                    [] {
                        if (threadIdx.x > 0) __reduce_add_sync(kAll, 1);
                    }),
                Optional(HasSubstr("__reduce_add_sync")));
    EXPECT_THAT(run(1, 32,
                    [] {
                        if (threadIdx.x > 0) __reduce_max_sync(kAll, 1);
                    }),
                Optional(HasSubstr("__reduce_max_sync")));
}

TEST_P(Simt, CatchesALaneThatMissesAWarpBarrier) {
    EXPECT_THAT(run(1, 32,
                    [] {
                        if (threadIdx.x != 3) __syncwarp();
                    }),
                Optional(HasSubstr("__syncwarp")));
}

TEST_P(Simt, CatchesABranchThatMeetsAnotherPrimitive) {
    const auto failed = run(1, 32, [] {
        if (threadIdx.x < 16) {
            __ballot_sync(kAll, 1);
        } else {
            __syncwarp();
        }
    });
    EXPECT_THAT(failed, Optional(HasSubstr("cannot meet")));
    EXPECT_THAT(failed, Optional(HasSubstr("__ballot_sync")));
    EXPECT_THAT(failed, Optional(HasSubstr("__syncwarp")));
}

TEST_P(Simt, CatchesMasksThatDiffer) {
    const auto failed = run(1, 32, [] { __shfl_sync(threadIdx.x == 0 ? kAll : kAll - 2, 1, 0); });
    EXPECT_NE(failed, std::nullopt);
}

TEST_P(Simt, CatchesACallerThatItsMaskDoesNotName) {
    EXPECT_THAT(run(1, 32, [] { __ballot_sync(0xffffu, 1); }),
                Optional(HasSubstr("does not name its caller")));
}

TEST_P(Simt, CatchesAShuffleFromALaneThatTakesNoPart) {
    const auto failed = run(1, 32, [] {
        if (threadIdx.x < 16) __shfl_sync(0xffffu, 1, 20);
    });
    EXPECT_THAT(failed, Optional(HasSubstr("reads lane 20")));
}

TEST_P(Simt, CatchesAMaskOfLanesThatTheBlockLacks) {
    EXPECT_THAT(run(1, 20, [] { __syncwarp(); }), Optional(HasSubstr("does not have")));
}

TEST_P(Simt, CatchesABlockBarrierThatAThreadMisses) {
    const auto failed = run(1, 64, [] {
        if (threadIdx.x != 33) __syncthreads();
    });
    EXPECT_THAT(failed, Optional(HasSubstr("__syncthreads")));
    EXPECT_THAT(failed, Optional(HasSubstr("thread 33 has returned")));
}

// Warps 0 and 1 hand numbers on, and so do 2 and 3, each two by a barrier of their own.
TEST_P(Simt, SomeOfABlocksWarpsMeet) {
    std::vector<unsigned> out(64);
    const auto failed = run(1, 128, [&] {
        __shared__ unsigned cells[2][2][32];
        const unsigned pair = threadIdx.x / 64, lane = threadIdx.x % 32;
        const bool gives = threadIdx.x / 32 % 2 == 0;
        for (unsigned i = 0; i < 5; ++i) {
            if (gives) cells[pair][i % 2][lane] = 100 * i + lane;
            simt_barrier_sync(pair + 14, 64);
            if (!gives) out[32 * pair + lane] += cells[pair][i % 2][31 - lane];
        }
    });
    EXPECT_EQ(failed, std::nullopt);
    EXPECT_EQ(out[0], 1000 + 5 * 31);
    EXPECT_EQ(out[63], 1000u);
}

// Who only arrives goes on: the giver is two cells ahead at most.
TEST_P(Simt, SomeArriveAndDoNotWait) {
    std::vector<unsigned> out(32);
    const auto failed = run(1, 64, [&] {
        __shared__ unsigned cells[2][32];
        const unsigned lane = threadIdx.x % 32;
        for (unsigned i = 0; i < 7; ++i) {
            if (threadIdx.x < 32) {
                if (i >= 2) simt_barrier_sync(3 + i % 2, 64);
                cells[i % 2][lane] = i + lane;
                simt_barrier_arrive(1 + i % 2, 64);
            } else {
                simt_barrier_sync(1 + i % 2, 64);
                out[lane] += cells[i % 2][31 - lane];
                if (i < 5) simt_barrier_arrive(3 + i % 2, 64);
            }
        }
    });
    EXPECT_EQ(failed, std::nullopt);
    EXPECT_EQ(out[0], 21 + 7 * 31);
    EXPECT_EQ(out[31], 21u);
}

TEST_P(Simt, CatchesABarrierThatTooFewReach) {
    const auto failed = run(1, 64, [] {
        if (threadIdx.x < 32) simt_barrier_sync(3, 64);
    });
    EXPECT_THAT(failed, Optional(HasSubstr("barrier.sync")));
    EXPECT_THAT(failed, Optional(HasSubstr("has returned")));
}

TEST_P(Simt, CatchesThoseWhoWaitAtDifferentBarriers) {
    const auto failed = run(1, 64, [] { simt_barrier_sync(threadIdx.x / 32, 64); });
    EXPECT_THAT(failed, Optional(HasSubstr("barrier.sync")));
}

TEST_P(Simt, CatchesABarrierForDifferentNumbers) {
    const auto failed = run(1, 96, [] { simt_barrier_sync(1, threadIdx.x < 32 ? 64 : 96); });
    EXPECT_THAT(failed, Optional(HasSubstr("another number of threads")));
}

// Some meet at barrier 0 again and again; then all meet, by a barrier in memory.
TEST_P(Simt, BarriersInMemoryOrderIt) {
    std::vector<unsigned> out(96);
    const auto failed = run(2, 96, [&] {
        __shared__ std::uint64_t barrier;
        __shared__ unsigned cells[96];
        if (threadIdx.x == 0) simt_mbarrier_init(&barrier, 96);
        __syncthreads();
        for (unsigned i = 0; i < 3 && threadIdx.x < 64; ++i) simt_barrier_sync(0, 64);
        cells[threadIdx.x] = threadIdx.x;
        for (unsigned phase = 0; phase < 3; ++phase) {
            simt_mbarrier_arrive(&barrier);
            while (!simt_mbarrier_try_wait(&barrier, phase % 2)) {
            }
            if (phase == 0) out[threadIdx.x] = cells[95 - threadIdx.x];
            if (phase == 1) cells[threadIdx.x] = 0;
        }
    });
    EXPECT_EQ(failed, std::nullopt);
    EXPECT_EQ(out[0], 95u);
    EXPECT_EQ(out[95], 0u);
}

TEST_P(Simt, CatchesABarrierInMemoryThatTooFewReach) {
    const auto failed = run(1, 64, [] {
        __shared__ std::uint64_t barrier;
        if (threadIdx.x == 0) simt_mbarrier_init(&barrier, 64);
        __syncthreads();
        if (threadIdx.x == 33) return;
        simt_mbarrier_arrive(&barrier);
        simt_mbarrier_try_wait(&barrier, 0);
    });
    EXPECT_THAT(failed, Optional(HasSubstr("mbarrier.try_wait")));
    EXPECT_THAT(failed, Optional(HasSubstr("thread 33 has returned")));
}

TEST_P(Simt, CatchesABarrierInMemoryThatIsForMore) {
    const auto failed = run(1, 64, [] {
        __shared__ std::uint64_t barrier;
        if (threadIdx.x == 0) simt_mbarrier_init(&barrier, 65);
        __syncthreads();
        simt_mbarrier_arrive(&barrier);
        simt_mbarrier_try_wait(&barrier, 0);
    });
    EXPECT_THAT(failed, Optional(HasSubstr("the barrier is for more")));
}

TEST_P(Simt, CatchesABarrierInMemoryThatIsNone) {
    const auto failed = run(1, 1, [] {
        __shared__ std::uint64_t barrier;
        simt_mbarrier_arrive(&barrier);
    });
    EXPECT_THAT(failed, Optional(HasSubstr("no barrier in shared memory")));
}

TEST_P(Simt, CatchesABlockBarrierAgainstAWarpPrimitive) {
    const auto failed = run(1, 32, [] {
        if (threadIdx.x == 0) {
            __syncthreads();
        } else {
            __syncwarp();
        }
    });
    EXPECT_THAT(failed, Optional(HasSubstr("__syncthreads")));
    EXPECT_THAT(failed, Optional(HasSubstr("__syncwarp")));
}

TEST_P(Simt, CatchesTrapsAndGoesOnWithTheNextLaunch) {
    EXPECT_THAT(run(5, 33,
                    [] {
                        if (blockIdx.x == 2 && threadIdx.x == 32) __trap();
                    }),
                Optional(testing::AllOf(HasSubstr("block (2, 0, 0)"), HasSubstr("thread 32"))));
    EXPECT_EQ(run(1, 33, [] { __syncthreads(); }), std::nullopt);
}

TEST_P(Simt, SharedMemoryDoesNotStartAsZero) {
    int zeros = 0;
    const auto kernel = [&] {
        __shared__ int cell;
        zeros += cell == 0;
        zeros += *reinterpret_cast<int*>(simt::dynamic_shared()) == 0;
        cell = 0;
        *reinterpret_cast<int*>(simt::dynamic_shared()) = 0;
    };
    EXPECT_EQ(run(4, 1, kernel, 4), std::nullopt);
    EXPECT_EQ(zeros, 0);
}

TEST_P(Simt, CatchesWritesBelowDynamicSharedMemory) {
    const auto failed = run(
        1, 1, [] { simt::dynamic_shared()[-1] = std::byte{1}; }, 16);
    EXPECT_THAT(failed, Optional(HasSubstr("below dynamic shared memory")));
}

TEST_P(Simt, RefusesLaunchesThatNoDeviceTakes) {
    EXPECT_NE(run(1, 1025, [] {}), std::nullopt);
    EXPECT_NE(run(0, 32, [] {}), std::nullopt);
    EXPECT_NE(run(
                  1, 32, [] {}, 49153),
              std::nullopt);
}

TEST_P(Simt, KeepsFailuresOfTheRuntimesLaunch) {
    const cudaLaunchConfig_t config = {.gridDim = {1}, .blockDim = {2}};
    void (*kernel)(int) = [](int bad) {
        if (static_cast<int>(threadIdx.x) != bad) __syncthreads();
    };
    EXPECT_EQ(cudaLaunchKernelEx(&config, kernel, 1), cudaErrorLaunchFailure);
    EXPECT_THAT(simt::take_failure(), HasSubstr("thread 1 has returned"));
    EXPECT_EQ(simt::take_failure(), "");
    EXPECT_EQ(cudaLaunchKernelEx(&config, kernel, 2), cudaSuccess);
}

INSTANTIATE_TEST_SUITE_P(Orders, Simt, kvcast::test::all_orders(), kvcast::test::order_name);

// A kernel that may lack a barrier: each thread reads its neighbour's cell.
struct Neighbours {
    std::optional<std::string> failed;
    std::vector<int> out = std::vector<int>(64);
};
Neighbours neighbours(Schedule schedule, bool barrier) {
    Neighbours n;
    simt::set_schedule(schedule);
    n.failed = simt::launch({1}, {64}, 0, [&] {
        __shared__ int cells[64];
        cells[threadIdx.x] = static_cast<int>(threadIdx.x);
        if (barrier) __syncthreads();
        n.out[threadIdx.x] = cells[(threadIdx.x + 1) % 64];
    });
    simt::set_schedule(Schedule::kForwards);
    return n;
}

TEST(SimtSchedules, ShowWhereABarrierIsMissing) {
    const Neighbours forwards = neighbours(Schedule::kForwards, true);
    EXPECT_EQ(forwards.failed, std::nullopt);
    EXPECT_EQ(forwards.out, neighbours(Schedule::kBackwards, true).out);
    EXPECT_EQ(forwards.out, neighbours(Schedule::kShuffled, true).out);
    EXPECT_NE(neighbours(Schedule::kForwards, false).out, neighbours(Schedule::kBackwards, false).out);
}

// The thread sanitizer sees races, where a build has it, under any schedule, and tells of each once. Here is
// one kernel for each kind; elsewhere they come to their end.
template <typename Kernel>
void expect_race(unsigned threads, Kernel kernel) {
    const auto failed = simt::launch({1}, {threads}, 0, kernel);
    if (simt::kSeesRaces) {
        EXPECT_THAT(failed, Optional(HasSubstr("threads race")));
    } else {
        EXPECT_EQ(failed, std::nullopt);
    }
}

TEST(SimtRaces, AreSeenWithoutABarrier) {
    int sum = 0;
    expect_race(64, [&] {
        __shared__ int cell;
        if (threadIdx.x == 63) cell = 1;
        if (threadIdx.x == 0) sum += cell;
    });
}

TEST(SimtRaces, AreSeenWhereAllStoreTheSame) {
    int sum = 0;
    expect_race(32, [&] {
        __shared__ int cell;
        cell = 1;
        __syncwarp();
        if (threadIdx.x == 0) sum += cell;
    });
}

TEST(SimtRaces, AreSeenBehindShuffles) {
    std::vector<int> out(32);
    expect_race(32, [&] {
        __shared__ int cells[32];
        cells[threadIdx.x] = 1;
        __shfl_sync(kAll, 1, 0);
        out[threadIdx.x] = cells[31 - threadIdx.x];
    });
}

TEST(SimtRaces, AreSeenBehindVotes) {
    std::vector<int> out(32);
    expect_race(32, [&] {
        __shared__ int cells[32];
        cells[threadIdx.x] = 1;
        if (__any_sync(kAll, 1) != 0) out[threadIdx.x] = cells[31 - threadIdx.x];
    });
}

TEST(SimtRaces, AreSeenBehindABarrierOfOtherWarps) {
    std::vector<int> out(96);
    expect_race(96, [&] {
        __shared__ int cell;
        if (threadIdx.x < 64) {
            if (threadIdx.x == 0) cell = 1;
            simt_barrier_sync(1, 64);
        }
        out[threadIdx.x] = cell;
    });
}

// Who arrives tells, and is not told.
TEST(SimtRaces, AreSeenOfThoseWhoOnlyArrive) {
    int sum = 0;
    expect_race(64, [&] {
        __shared__ int cell;
        if (threadIdx.x < 32) {
            simt_barrier_arrive(1, 64);
            if (threadIdx.x == 0) sum += cell;
        } else {
            if (threadIdx.x == 32) cell = 1;
            simt_barrier_sync(1, 64);
        }
    });
}

TEST(SimtRaces, AreSeenBehindAtomics) {
    std::vector<int> out(33);
    expect_race(33, [&] {
        __shared__ unsigned cells[4];  // apart: the sanitizer remembers four accesses of eight bytes
        if (threadIdx.x == 0) cells[3] = 0;
        __syncthreads();
        if (threadIdx.x == 0) cells[0] = 1;
        if (atomicAdd(&cells[3], 1u) == 32) out[0] = static_cast<int>(cells[0]);
    });
}

// A copy is seen by the thread that has waited for it; others need a barrier behind that.
TEST(SimtRaces, AreSeenOfCopiesThatAnotherThreadHasMade) {
    std::vector<int> from(64, 1), out(64);
    expect_race(64, [&] {
        __shared__ int cells[64];
        simt_copy_async(&cells[threadIdx.x], &from[threadIdx.x], 4);
        simt_commit_copies();
        __syncthreads();
        simt_wait_copies(0);
        out[threadIdx.x] = cells[63 - threadIdx.x];
    });
}

TEST(SimtRaces, AreSeenInGlobalMemory) {
    int cell = 0;
    expect_race(64, [&] {
        if (threadIdx.x % 63 == 0) cell += static_cast<int>(threadIdx.x);
    });
}

using SimtDeathTest = testing::Test;

TEST(SimtDeathTest, AccessesOutsideAnArrayFault) {
    const Guarded<std::uint16_t> end(5), begin(5, Edge::kBegin);
    std::uint16_t sum = 0;
    const auto read = [&](const std::uint16_t* p) {
        static_cast<void>(simt::launch({1}, {4}, 0, [&, p] {
            if (threadIdx.x == 3) sum = *static_cast<const volatile std::uint16_t*>(p);
        }));
    };
    read(end.data() + 4);
    read(begin.data());
    EXPECT_EQ(sum, 0xa5a5);
    EXPECT_DEATH(read(end.data() + 5), "block \\(0, 0, 0\\), thread 3: access outside memory");
    EXPECT_DEATH(read(begin.data() - 1), "thread 3: access outside memory");
}

TEST(SimtDeathTest, AccessesPastDynamicSharedMemoryFault) {
    EXPECT_DEATH(static_cast<void>(simt::launch(
                     {1}, {1}, 48,
                     [] { *static_cast<volatile std::byte*>(simt::dynamic_shared() + 48) = std::byte{0}; })),
                 "access outside memory");
}

// Whoever set it frees it: the address sanitizer for every thread, at its end.
TEST(SimtThreads, KeepTheirSignalStacks) {
    std::thread([] {
        std::vector<std::byte> mine(65536);
        const stack_t set = {.ss_sp = mine.data(), .ss_flags = 0, .ss_size = mine.size()};
        stack_t before = {}, after = {};
        ASSERT_EQ(sigaltstack(&set, &before), 0);
        EXPECT_EQ(simt::launch({1}, {4}, 0, [] { __syncthreads(); }), std::nullopt);
        ASSERT_EQ(sigaltstack(&before, &after), 0);
        EXPECT_EQ(after.ss_sp, mine.data());
    }).join();
}

TEST(SimtGuarded, NoticesWritesOnTheFarSide) {
    const Guarded<std::uint8_t> a(10), b(10, Edge::kBegin);
    EXPECT_TRUE(a.intact() && b.intact());
    a.data()[-1] = 0;
    b.data()[10] = 0;
    EXPECT_FALSE(a.intact() || b.intact());
}

}  // namespace
