#include "kernels/avx2/slots.h"
#include "kernels/backends.h"

namespace kvcast::kernels {

const Ops& avx2_ops() {
    static const Ops table = [] {
        Ops ops = scalar_ops();
        ops.name = "avx2";
        ops.decode_strips = avx2::decode_strips;
        ops.encode_strips = avx2::encode_strips;
        ops.decode_floats = avx2::decode_floats;
        ops.encode_floats = avx2::encode_floats;
        ops.choose_exponents = avx2::choose_exponents;
        ops.value_costs = avx2::value_costs;
        ops.load_head = avx2::load_head;
        ops.load_rows = avx2::load_rows;
        ops.load_elements = avx2::load_elements;
        ops.turns = avx2::turns;
        ops.moments = avx2::moments;
        ops.rounded_sum = avx2::rounded_sum;
        ops.quantise = avx2::quantise;
        ops.reconstruct = avx2::reconstruct;
        ops.residual = avx2::residual;
        ops.share_exponent = avx2::share_exponent;
        ops.round_steps = avx2::round_steps;
        ops.strips_to_rows = avx2::strips_to_rows;
        ops.rows_to_strips = avx2::rows_to_strips;
        ops.saturate = avx2::saturate;
        ops.state_features = avx2::state_features;
        ops.project = avx2::project;
        ops.store_head = avx2::store_head;
        ops.store_states = avx2::store_states;
        ops.store_exact = avx2::store_exact;
        ops.send = avx2::send;
        ops.sends_past_caches = true;
        return ops;
    }();
    return table;
}

}  // namespace kvcast::kernels
