// Giving up a transfer that a coarser level or text would beat.
#pragma once

#include <optional>

#include "streamer/rules/rule.h"

namespace kvcast::streamer {

// What a rule expects if transfers go on as they are: everything pending at the coarsest level, at the full
// robust rate.
struct Prospect {
    Seconds load = 0;  // until all that is loaded is decoded
    Seconds text = 0;  // until the engine could begin with another chunk; infinite: it may not have any
};

// With r the robust rate, w the wait for a first byte, T the time left and m what is still to come of a
// transfer, for a prospect that is late (load > T):
//
//   text   the first transfer in flight with  text + prefill < T  and  prefill ends before  m / r
//   else   the transfer with the greatest gain  g = m - bytes(l) - w r > 0, where l is the finest level with
//          load - g / r <= 0.6 T, or the coarsest
//
// Source: abandonment as dash.js and BOLA-E (arXiv 1601.06748, and Spiteri et al., MMSys 2018) do it, with
// the deadline in place of the buffer. Nothing where the prospect is in time, or nothing would gain.
std::optional<Decision> abandon(const RuleState& state, const Prospect& prospect);

}  // namespace kvcast::streamer
