#include "kernels/scalar/slots.h"

namespace kvcast::kernels {

const Ops& scalar_ops() {
    static constexpr Ops table = {
        .name = "scalar",
        .decode_strips = scalar::decode_strips,
        .encode_strips = scalar::encode_strips,
        .decode_floats = scalar::decode_floats,
        .encode_floats = scalar::encode_floats,
        .choose_exponents = scalar::choose_exponents,
        .value_costs = scalar::value_costs,
        .load_head = scalar::load_head,
        .load_rows = scalar::load_rows,
        .load_elements = scalar::load_elements,
        .turns = scalar::turns,
        .moments = scalar::moments,
        .rounded_sum = scalar::rounded_sum,
        .quantise = scalar::quantise,
        .reconstruct = scalar::reconstruct,
        .residual = scalar::residual,
        .share_exponent = scalar::share_exponent,
        .round_steps = scalar::round_steps,
        .strips_to_rows = scalar::strips_to_rows,
        .rows_to_strips = scalar::rows_to_strips,
        .saturate = scalar::saturate,
        .state_features = scalar::state_features,
        .project = scalar::project,
        .store_head = scalar::store_head,
        .store_states = scalar::store_states,
        .store_exact = scalar::store_exact,
        .send = scalar::send,
        .sends_past_caches = false,
    };
    return table;
}

}  // namespace kvcast::kernels
