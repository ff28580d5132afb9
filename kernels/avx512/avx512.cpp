#include "kernels/avx512/slots.h"
#include "kernels/backends.h"

namespace kvcast::kernels {

const Ops& avx512_ops() {
    static const Ops table = [] {
        Ops ops = avx2_ops();
        ops.name = "avx512";
        ops.decode_strips = avx512::decode_strips;
        ops.encode_strips = avx512::encode_strips;
        ops.decode_floats = avx512::decode_floats;
        ops.encode_floats = avx512::encode_floats;
        ops.choose_exponents = avx512::choose_exponents;
        ops.value_costs = avx512::value_costs;
        ops.load_head = avx512::load_head;
        ops.load_rows = avx512::load_rows;
        ops.load_elements = avx512::load_elements;
        ops.turns = avx512::turns;
        ops.moments = avx512::moments;
        ops.rounded_sum = avx512::rounded_sum;
        ops.quantise = avx512::quantise;
        ops.reconstruct = avx512::reconstruct;
        ops.residual = avx512::residual;
        ops.share_exponent = avx512::share_exponent;
        ops.round_steps = avx512::round_steps;
        ops.saturate = avx512::saturate;
        ops.state_features = avx512::state_features;
        ops.project = avx512::project;
        ops.store_head = avx512::store_head;
        ops.store_states = avx512::store_states;
        ops.store_exact = avx512::store_exact;
        ops.send = avx512::send;
        ops.sends_past_caches = true;
        return ops;
    }();
    return table;
}

}  // namespace kvcast::kernels
