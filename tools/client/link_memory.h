// What earlier sessions with a server have shown of its link, kept in the cache's folder.
#pragma once

#include <optional>
#include <string>

#include "streamer/throughput.h"

namespace kvcast::client {

// For the URL's server (scheme, host and port). After an hour, with the usual doubt, and at
// least the usual rate; nullopt where nothing is
// known, or the folder is "".
std::optional<streamer::NetworkPrior> remembered_link(const std::string& folder, const std::string& url);

// A folder that cannot be written is no error: the next session begins with a guess.
void remember_link(const std::string& folder, const std::string& url, const streamer::NetworkPrior& link);

}  // namespace kvcast::client
