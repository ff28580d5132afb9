// What kvpublish and kvfetch ask for in the same way.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "streamer/signature.h"

namespace kvcast::tools {

// Throw Error.
streamer::PrivateKey load_private_key(const std::string& path);
streamer::PublicKey load_public_key(const std::string& path);

// "90s", "15m", "12h" or "7d", in seconds; "0s" is none. Throws Error, which names the option.
std::int64_t parse_duration(const std::string& option, const std::string& text);

// Of "all", or a list such as 0,2-5: no piece of it is empty, which in a range would mean all.
const CLI::Validator& level_list();

// A JSON array of token ids. Throws Error, DamagedInput where the file holds something else.
std::vector<std::int32_t> read_token_ids(const std::string& path);

// Throws Error with the status' sentence.
void require(const Status& status);
template <typename T>
T require(Result<T> result) {
    require(result.status());
    return std::move(result.value());
}

}  // namespace kvcast::tools
