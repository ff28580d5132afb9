// States of units that do not depend on each other, by tiles: waves of a plan, and the steps of an encoder's
// loop. FORMAT.md, section 11.3.
#include "kernels/cuda/project.cuh"

namespace kvcast::kernels::cuda {
namespace {

// Features come to shared memory by pieces of so many inputs, one piece ahead of its use.
constexpr std::uint32_t kPieceInputs = 128;

struct alignas(16) PieceRows {
    std::byte bytes[kProjectTokens * wide_pitch(kPieceInputs)];
};

// The pieces of a unit's terms in the order of their use: once for each limb of a term's matrix.
struct Piece {
    std::uint32_t term;
    std::uint32_t limb;
    std::uint32_t first;  // input

    __device__ void next(const UnitTask& unit) {
        first += kPieceInputs;
        if (first < unit.terms[term].inputs) return;
        first = 0;
        if (++limb < unit.terms[term].limbs) return;
        limb = 0;
        ++term;
    }
};

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
          ahead_{first_term, 0, 0} {
        send();
        send();
    }

    // The next piece, whose rows have arrived. By all threads.
    __device__ WideRows take() {
        wait_copies<1>();
        __syncthreads();
        return {buffers_[taken_ % 2].bytes, wide_pitch(kPieceInputs)};
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
            const ProjectionTerm& term = unit_.terms[ahead_.term];
            const auto* rows = reinterpret_cast<const std::int16_t*>(
                (term.in_image ? memory_.image : memory_.workspace) + term.features);
            stage_rows(buffers_[sent_ % 2].bytes, wide_pitch(kPieceInputs),
                       rows + std::uint64_t{first_token_} * term.stride + ahead_.first, term.stride, tokens_,
                       lesser(kPieceInputs, term.inputs - ahead_.first));
            ahead_.next(unit_);
        }
        ++sent_;
        commit_copies();  // of nothing at the end, so that they are counted alike
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

// The steps of a piece that are worth multiplying.
__device__ std::uint32_t steps_of(const UnitTask& unit, std::uint32_t term, std::uint32_t first_input,
                                  std::uint32_t masked) {
    const std::uint32_t inputs = lesser(kPieceInputs, unit.terms[term].inputs - first_input);
    const std::uint32_t all = all_steps(div_up(inputs, kUnitStep)), first = first_input / kUnitStep;
    return term + 1 == unit.term_count && first < 32 ? masked >> first & all : all;
}

// The sums of one term, all pieces and limbs of it. A piece's matrix is on its way before its rows are there.
__device__ void multiply_term(Pipeline& pipeline, const UnitTask& unit, std::uint32_t k, const WarpPlace& at,
                              std::uint32_t first_output, std::uint32_t masked, const Shifts& shifts,
                              LimbSums& sums) {
    const ProjectionTerm& term = unit.terms[k];
    const bool outside = first_output + at.output >= unit.outputs;
    for (std::uint32_t limb = 0; limb < term.limbs; ++limb) {
        if (limb != 0) sums.fold(shifts);
        const LimbFragments matrix(term, limb, unit.width, outside ? 0 : first_output + at.output);
        for (std::uint32_t first = 0; first < term.inputs; first += kPieceInputs) {
            MatrixSteps steps(matrix, first / kUnitStep, outside ? 0 : steps_of(unit, k, first, masked));
            const WideRows rows = pipeline.take();
            if (limb == 0) {
                steps.multiply<true>(rows, sums);
            } else {
                steps.multiply<false>(rows, sums);
            }
            pipeline.release();
        }
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
    const WarpPlace at = warp_place();
    auto* kept = reinterpret_cast<std::int32_t*>(memory.workspace + unit.sums);
    auto* states = reinterpret_cast<std::int16_t*>(memory.workspace + unit.states);
    Totals totals = {};
    const auto for_all_inside = [&](auto work) {
        totals.for_all([&](std::uint32_t m, std::uint32_t n, std::uint32_t i, std::int32_t& total) {
            const std::uint32_t token = first_token + at.token_of(m, i);
            const std::uint32_t output = first_output + at.output_of(n, i);
            if (token < unit.tokens && output < unit.outputs)
                work(total, output, std::uint64_t{token} * unit.stride + output);
        });
    };
    for_all_inside([&](std::int32_t& total, std::uint32_t output, std::uint64_t index) {
        if constexpr (S == Stage::kReconstruction) {
            total = kept[index];
        } else if constexpr (S != Stage::kProduct) {
            total = unit.bias[output];
        }
    });
    const std::uint32_t first = S == Stage::kReconstruction ? unit.term_count - 1 : 0;
    const std::uint32_t end = S == Stage::kPrediction ? unit.term_count - 1 : unit.term_count;
    std::uint32_t masked = ~0u;
    if (S != Stage::kPrediction && S != Stage::kProduct && unit.has_masks) {
        masked = coded_groups(reinterpret_cast<const std::uint32_t*>(memory.workspace + unit.masks),
                              first_token, unit.tokens);
    }
    Pipeline pipeline(buffers, unit, memory, first_token, first, end);
    for (std::uint32_t k = first; k < end; ++k) {
        const Shifts shifts(unit.terms[k].shifts, at, first_output, unit.width);
        LimbSums sums(shifts, unit.terms[k].limbs == 1);
        multiply_term(pipeline, unit, k, at, first_output, masked, shifts, sums);
        totals.add(sums, shifts);
    }
    wait_copies<0>();
    for_all_inside([&](std::int32_t& total, std::uint32_t, std::uint64_t index) {
        if constexpr (S == Stage::kPrediction || S == Stage::kProduct) {
            kept[index] = total;
        } else {
            states[index] = saturate16(total);
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
