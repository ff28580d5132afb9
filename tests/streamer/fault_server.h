// Runs fault_server.py, and tells it what to do.
#pragma once

#include <string>
#include <vector>

namespace kvcast::test {

class FaultServer {
  public:
    // Serves `folder` until destroyed. Arguments as the script takes them.
    explicit FaultServer(const std::string& folder, std::vector<std::string> arguments = {});
    ~FaultServer();
    FaultServer(const FaultServer&) = delete;
    FaultServer& operator=(const FaultServer&) = delete;

    int port() const { return port_; }
    std::string url(const std::string& name, const std::string& host = "127.0.0.1") const;

    // A fault as JSON: see the script.
    void fault(const std::string& json) { command(json); }
    std::size_t count(const std::string& regex);

  private:
    std::string command(const std::string& json);

    int pid_ = -1;
    int in_ = -1;   // of the script
    int out_ = -1;  // from the script
    int port_ = 0;
    bool tls_ = false;
};

}  // namespace kvcast::test
