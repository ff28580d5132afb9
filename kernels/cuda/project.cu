// States and features of units that do not depend on each other, by tiles: waves of a plan, and the steps of
// an encoder's loop. FORMAT.md, section 11.3.
#include "kernels/cuda/project.cuh"

namespace kvcast::kernels::cuda {
namespace {

// Features come to shared memory by pieces of so many inputs, one piece ahead of its use.
constexpr std::uint32_t kPieceInputs = 128;

constexpr std::uint32_t kTiles = kProjectTokens / kTokenTile;

struct alignas(16) PieceRows {
    std::byte bytes[kProjectTokens * wide_pitch(kPieceInputs)];
};

// The pieces of a unit's terms in the order of their use.
struct Piece {
    std::uint32_t term;
    std::uint32_t first;  // input

    __device__ void next(const UnitTask& unit) {
        first += kPieceInputs;
        if (first < unit.terms[term].inputs) return;
        first = 0;
        ++term;
    }
};

// Rows of features on their way to shared memory: `tokens` rows of `inputs` elements, by all threads.
// Elements beyond them are left alone: they meet zeros of the matrix, or tokens that nobody asks for.
template <typename Feature>
__device__ void stage_rows(std::byte* to, std::uint32_t pitch, const Feature* from, std::uint64_t stride,
                           std::uint32_t tokens, std::uint32_t inputs) {
    constexpr std::uint32_t unit = 16 / sizeof(Feature);  // elements of a copy
    const bool aligned = reinterpret_cast<std::uintptr_t>(from) % 16 == 0 && stride % unit == 0;
    const std::uint32_t pieces = div_up(inputs, unit);
    for (std::uint32_t i = threadIdx.x; i < tokens * pieces; i += blockDim.x) {
        const std::uint32_t t = i / pieces, first = i % pieces * unit;
        const Feature* source = from + t * stride + first;
        auto* target = reinterpret_cast<Feature*>(to + t * pitch) + first;
        if (aligned && first + unit <= inputs) {
            copy_16(target, source);
        } else {
            for (std::uint32_t k = 0; k < unit && first + k < inputs; ++k) target[k] = source[k];
        }
    }
}

class Pipeline {
  public:
    __device__ Pipeline(PieceRows (&buffers)[2], const UnitTask& unit, Memory memory,
                        std::uint32_t first_token, std::uint32_t first_term, std::uint32_t end_term)
        : buffers_(buffers),
          unit_(unit),
          memory_(memory),
          first_token_(first_token),
          tokens_(lesser(kProjectTokens, unit.tokens - first_token)),
          end_(end_term),
          ahead_{first_term, 0} {
        send();
        send();
    }

    // The next piece, whose rows have arrived. By all threads.
    __device__ const std::byte* take() {
        wait_copies<1>();
        __syncthreads();
        return buffers_[taken_ % 2].bytes;
    }

    // The piece has been used by this thread.
    __device__ void release() {
        __syncthreads();
        ++taken_;
        send();
    }

  private:
    __device__ void send() {
        if (ahead_.term < end_) {
            if (unit_.terms[ahead_.term].narrow) {
                send<std::int8_t>(narrow_pitch(kPieceInputs));
            } else {
                send<std::int16_t>(wide_pitch(kPieceInputs));
            }
            ahead_.next(unit_);
        }
        ++sent_;
        commit_copies();  // of nothing at the end, so that they are counted alike
    }

    template <typename Feature>
    __device__ void send(std::uint32_t pitch) {
        const ProjectionTerm& term = unit_.terms[ahead_.term];
        const auto* rows = reinterpret_cast<const Feature*>(
            (term.in_image ? memory_.image : memory_.workspace) + term.features);
        stage_rows(buffers_[sent_ % 2].bytes, pitch,
                   rows + std::uint64_t{first_token_} * term.stride + ahead_.first, term.stride, tokens_,
                   lesser(kPieceInputs, term.inputs - ahead_.first));
    }

    PieceRows (&buffers_)[2];
    const UnitTask& unit_;
    Memory memory_;
    std::uint32_t first_token_;
    std::uint32_t tokens_;
    std::uint32_t end_;
    Piece ahead_;
    std::uint32_t sent_ = 0;
    std::uint32_t taken_ = 0;
};

// The groups of coefficients that any token of a tile has.
__device__ std::uint32_t coded_groups(Memory memory, const UnitTask& unit, std::uint32_t first_token) {
    const auto* masks = reinterpret_cast<const std::uint32_t*>(memory.workspace + unit.masks);
    const std::uint32_t end = lesser(unit.tokens, first_token + kProjectTokens);
    std::uint32_t coded = 0;
    for (std::uint32_t t = first_token + lane_id(); t < end; t += kLanes) coded |= masks[t];
    return __reduce_or_sync(kFullWarp, coded);
}

// Loads what is wanted, to the same registers in any case: those of a branch that is not always taken would
// be copied, and waited for at that place. Nobody else on the multiprocessor wants these bytes.
__device__ __forceinline__ void load_slot(MatrixSlot& slot, const std::uint8_t* from, bool wanted) {
    for (std::uint32_t n = 0; n < kOutputTiles; ++n) {
        std::uint32_t(&words)[4] = slot.words[n];
        const std::uint8_t* at = from + n * 2 * kFragmentBytes;
#ifdef KVCAST_SIMT
        if (wanted) std::memcpy(words, at, sizeof words);
#else
        asm volatile(
            "{\n.reg .pred p;\nsetp.ne.u32 p, %5, 0;\n"
            "@p ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
            : "+r"(words[0]), "+r"(words[1]), "+r"(words[2]), "+r"(words[3])
            : "l"(at), "r"(static_cast<std::uint32_t>(wanted)));
#endif
    }
}

// Steps of a matrix, some slots of which are on their way. Begun well before its steps are used, it makes
// nobody wait.
template <std::uint32_t Limbs>
class MatrixSteps {
  public:
    // Steps from `first` on, which begins a slot.
    __device__ __forceinline__ void begin(const ProjectionTerm& term, std::uint32_t output,
                                          std::uint32_t first, std::uint32_t steps) {
        steps_ = steps;
        next_ = slots_at(term, output, first);
        KVCAST_UNROLL(kAhead)
        for (std::uint32_t i = 0; i < kAhead; ++i) load(ahead_[i], i * kSteps);
    }

    // Adds all of them, on rows whose step 0 is the first one.
    template <typename Rows>
    __device__ __forceinline__ void multiply(const Rows& rows, LimbSums<kTiles>& sums) {
        KVCAST_UNROLL(1)
        for (std::uint32_t first = 0; first < steps_; first += kAhead * kSteps) {
            KVCAST_UNROLL(kAhead)  // so that ahead_ lies in registers
            for (std::uint32_t i = 0; i < kAhead; ++i) {
                const std::uint32_t step = first + i * kSteps;
                if (step >= steps_) break;
                multiply_slot<false, Limbs>(rows, step, steps_, ahead_[i], {}, sums);
                load(ahead_[i], step + kAhead * kSteps);
            }
        }
    }

  private:
    static constexpr std::uint32_t kAhead = 3;
    static constexpr std::uint32_t kSteps = slot_steps(Limbs);

    // The slot of a step, the next one.
    __device__ __forceinline__ void load(MatrixSlot& slot, std::uint32_t step) {
        load_slot(slot, next_, step < steps_);
        next_ += kSlotBytes;
    }

    const std::uint8_t* next_ = nullptr;  // this lane's bytes of the first slot that is not on its way
    std::uint32_t steps_ = 0;
    MatrixSlot ahead_[kAhead] = {};
};

// The sums of one term, whose first `steps` are worth multiplying. A piece's matrix is on its way before its
// rows are there.
template <std::uint32_t Limbs>
__device__ void multiply_term(Pipeline& pipeline, const ProjectionTerm& term, std::uint32_t output,
                              std::uint32_t steps, LimbSums<kTiles>& sums) {
    constexpr std::uint32_t piece = kPieceInputs / kUnitStep;
    MatrixSteps<Limbs> matrix;
    for (std::uint32_t first = 0; first * kUnitStep < term.inputs; first += piece) {
        matrix.begin(term, output, first, first < steps ? lesser(piece, steps - first) : 0);
        const std::byte* rows = pipeline.take();
        if (term.narrow) {
            matrix.multiply(ByteRows{rows, narrow_pitch(kPieceInputs)}, sums);
        } else {
            matrix.multiply(WideRows{rows, wide_pitch(kPieceInputs)}, sums);
        }
        pipeline.release();
    }
}

// A decoder goes from the bias to states at once. An encoder stops at the prediction, has what is missing
// multiplied by the inverse transform, the only term of another task, and goes on from the prediction when it
// has chosen coefficients.
enum class Stage : std::uint8_t { kWhole, kPrediction, kProduct, kReconstruction };

template <Stage S>
__global__ void __launch_bounds__(kProjectThreads, 1)
    project_tiles(Memory memory, const UnitTask* units, std::uint32_t count) {
    __shared__ PieceRows buffers[2];
    const UnitTask& unit = units[task_of<&UnitTask::first_tile>(units, count, blockIdx.x)];
    const std::uint32_t local = blockIdx.x - unit.first_tile, across = div_up(unit.outputs, kProjectOutputs);
    const std::uint32_t first_token = local / across * kProjectTokens;
    const std::uint32_t first_output = local % across * kProjectOutputs;
    const WarpPlace at = {first_output + warp_id() * kWarpOutputs};
    const bool outside = at.output >= unit.outputs;
    auto* kept = reinterpret_cast<std::int32_t*>(memory.workspace + unit.sums);
    auto* states =
        unit.states == kNowhere ? nullptr : reinterpret_cast<std::int16_t*>(memory.workspace + unit.states);
    auto* features = reinterpret_cast<std::int8_t*>(memory.workspace + unit.features);
    Totals<kTiles> totals = {};
    const auto for_all_inside = [&](auto work) {
        for_all_sums<kTiles>([&](std::uint32_t m, std::uint32_t n, std::uint32_t i) {
            const std::uint32_t token = first_token + at.token_of(m, i);
            const std::uint32_t output = at.output_of(n, i);
            if (token < unit.tokens && output < unit.outputs)
                work(totals.v[m][n][i], output, std::uint64_t{token} * unit.stride + output);
        });
    };
    for_all_inside([&](std::int32_t& total, std::uint32_t output, std::uint64_t index) {
        if constexpr (S == Stage::kReconstruction) {
            total = kept[index];
        } else if constexpr (S != Stage::kProduct) {
            total = bias_of(unit.channels[output]);
        }
    });
    const std::uint32_t first = S == Stage::kReconstruction ? unit.term_count - 1 : 0;
    const std::uint32_t end = S == Stage::kPrediction ? unit.term_count - 1 : unit.term_count;
    constexpr bool transforms = S == Stage::kWhole || S == Stage::kReconstruction;
    const std::uint32_t masks = transforms && unit.has_masks ? coded_groups(memory, unit, first_token) : ~0u;
    Pipeline pipeline(buffers, unit, memory, first_token, first, end);
    for (std::uint32_t k = first; k < end; ++k) {
        const ProjectionTerm& term = unit.terms[k];
        const std::uint32_t output = outside ? 0 : at.output;
        Shifts shifts;
        shifts.load(term.shifts, output);
        LimbSums<kTiles> sums;
        sums.start(shifts);
        const std::uint32_t steps =
            outside ? 0 : coded_steps(k + 1 == unit.term_count ? masks : ~0u, term.inputs);
        if (term.limbs == 2) {
            multiply_term<2>(pipeline, term, output, steps, sums);
        } else {
            multiply_term<1>(pipeline, term, output, steps, sums);
        }
        totals.add(sums, shifts);
    }
    wait_copies<0>();
    for_all_inside([&](std::int32_t& total, std::uint32_t output, std::uint64_t index) {
        if constexpr (S == Stage::kPrediction || S == Stage::kProduct) {
            kept[index] = total;
        } else {
            const std::uint32_t channel = unit.channels[output];
            const std::int16_t state = saturate16(total);
            if (states != nullptr) states[index] = state;
            features[index] =
                static_cast<std::int8_t>(state_feature(state, bias_of(channel), feature_factor_of(channel)));
        }
    });
}

}  // namespace

cudaError_t launch_project(Memory memory, const UnitTask* units, std::uint32_t count, std::uint32_t tiles,
                           cudaStream_t stream) {
    return launch(project_tiles<Stage::kWhole>, {tiles, kProjectThreads}, stream, memory, units, count);
}

cudaError_t launch_predict(Memory memory, const UnitTask* units, std::uint32_t count, std::uint32_t tiles,
                           cudaStream_t stream) {
    return launch(project_tiles<Stage::kPrediction>, {tiles, kProjectThreads}, stream, memory, units, count);
}

cudaError_t launch_product(Memory memory, const UnitTask* units, std::uint32_t count, std::uint32_t tiles,
                           cudaStream_t stream) {
    return launch(project_tiles<Stage::kProduct>, {tiles, kProjectThreads}, stream, memory, units, count);
}

cudaError_t launch_reconstruct(Memory memory, const UnitTask* units, std::uint32_t count, std::uint32_t tiles,
                               cudaStream_t stream) {
    return launch(project_tiles<Stage::kReconstruction>, {tiles, kProjectThreads}, stream, memory, units,
                  count);
}

}  // namespace kvcast::kernels::cuda
