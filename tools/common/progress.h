// A one-line progress display on standard error, shown only where that is a terminal.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace kvcast::tools {

// Redraws at most ten times a second; the destructor clears the line. The unit follows a decimal prefix ("B",
// "tokens"); a total of 0 is unknown. Not thread-safe.
class Progress {
  public:
    Progress(std::string label, std::uint64_t total_units, std::string unit);
    ~Progress();
    Progress(const Progress&) = delete;
    Progress& operator=(const Progress&) = delete;

    void advance(std::uint64_t units);

  private:
    void draw();

    std::string label_;
    std::string unit_;
    std::uint64_t total_;
    std::uint64_t done_ = 0;
    bool enabled_;
    std::chrono::steady_clock::time_point start_;
    std::chrono::steady_clock::time_point next_draw_;
};

}  // namespace kvcast::tools
