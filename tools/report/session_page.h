// A session on one page: what was decided, when and why, and whether the deadline held.
#pragma once

#include <string>
#include <vector>

#include "streamer/controller.h"

namespace kvcast::tools {

struct SessionPage {
    std::string title;  // what was fetched, and over which link
    std::string rule;   // by name
    const streamer::Recording* recording = nullptr;
    // The link's real rate, where it is known: (seconds since the session began, bytes per second from there
    // on), ascending. Empty: not known.
    std::vector<std::pair<streamer::Seconds, double>> truth = {};
};

// One HTML document, UTF-8, with its drawing and style inside: nothing is loaded from elsewhere. Light or
// dark as the reader's system is. Hovering shows each decision's reason.
std::string render(const SessionPage& page);

}  // namespace kvcast::tools
