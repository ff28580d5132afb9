// Brings the calibration that a session's chunks may need: asks the codec whether it has it, fetches what is
// missing of it, and leaves with the codec what came of one that nobody waits for any more.
//
// On the loop's thread, but for what the codec does: that is on a lane, for it may take its time.
#pragma once

#include <cstdint>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "streamer/chunk_codec.h"
#include "streamer/controller.h"
#include "streamer/download.h"
#include "streamer/lane.h"
#include "streamer/manifest.h"
#include "streamer/steps.h"

namespace kvcast::streamer {

class CalibrationFetch final : public DownloadObserver {
  public:
    // Whose chunks need it.
    class Owner {
      public:
        virtual ~Owner() = default;
        // Nobody has to wait for it any more: the codec has it, or (an error) it is out of reach. Once.
        virtual void on_calibration(const Status& status) = 0;
        // Decides anew, after something has changed.
        virtual void pump() = 0;
    };
    // All of it outlives the fetch.
    struct Environment {
        Steps& steps;
        Owner& owner;
        EventLoop& loop;
        Transport& transport;
        const DownloadOptions& download;
        ChunkCodec& codec;
        Controller& controller;  // is told what comes
        std::mt19937_64& random;
    };

    explicit CalibrationFetch(const Environment& e)
        : steps_(e.steps),
          owner_(e.owner),
          loop_(e.loop),
          transport_(e.transport),
          download_(e.download),
          codec_(e.codec),
          controller_(e.controller),
          random_(e.random) {}

    // There is one, at `url`.
    void begin(const ManifestCalibration& calibration, std::string url);
    // A chunk that needs it is to be loaded: the next go_on() asks for it.
    void want();
    void go_on();
    // The owner goes on without it. What is on its way comes as long as nothing else does.
    void give_up(const Status& why);
    // Ends what is on its way; what came of it is for the next session.
    void drop();
    // The same where there is no memory to keep anything.
    void clear() { transfer_.reset(); }
    // Nobody has to wait for it: it is there, out of reach, or there is none.
    bool is_settled() const { return state_ == State::kSettled; }
    // Waits for the codec, which may have to keep what came. From any thread; last.
    void finish() { lane_.finish(); }

  private:
    enum class State : std::uint8_t { kUnneeded, kWanted, kAsked, kSettled };
    struct Transfer {
        std::uint64_t begun = 0;  // bytes that there were before this session
        Seconds started = 0;
        std::uint64_t came = 0;  // over the network
        bool busy = false;
        std::unique_ptr<Download> download;
    };

    void ask();
    void fetch(std::vector<std::uint8_t> front);
    void keep_begun(const Transfer& transfer);
    void on_first_byte(Duration latency) override;
    void on_bytes(std::size_t count) override;
    void on_finished(Result<std::vector<std::uint8_t>> object, int http_status) override;
    void on_file(std::vector<std::uint8_t> file, bool resumed);
    Status add_on_lane(std::span<const std::uint8_t> file);
    void settle(const Status& status);

    Steps& steps_;
    Owner& owner_;
    EventLoop& loop_;
    Transport& transport_;
    const DownloadOptions& download_;
    ChunkCodec& codec_;
    Controller& controller_;
    std::mt19937_64& random_;
    ManifestCalibration calibration_;
    std::string url_;
    State state_ = State::kSettled;
    std::optional<Transfer> transfer_;
    Lane lane_;
};

}  // namespace kvcast::streamer
