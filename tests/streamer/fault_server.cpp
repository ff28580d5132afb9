#include "tests/streamer/fault_server.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <stdexcept>

namespace kvcast::test {
namespace {

std::string read_line(int fd) {
    std::string line;
    char c = 0;
    while (::read(fd, &c, 1) == 1) {
        if (c == '\n') return line;
        line += c;
    }
    throw std::runtime_error("fault_server.py ended");
}

}  // namespace

FaultServer::FaultServer(const std::string& folder, std::vector<std::string> arguments)
    : tls_(std::ranges::find(arguments, "--tls") != arguments.end()) {
    std::array<int, 2> in = {}, out = {};
    if (::pipe2(in.data(), O_CLOEXEC) != 0 || ::pipe2(out.data(), O_CLOEXEC) != 0)
        throw std::runtime_error("pipe");
    arguments.insert(arguments.begin(), {"/usr/bin/python3", KVCAST_FAULT_SERVER, folder});
    std::vector<char*> raw;
    for (std::string& a : arguments) raw.push_back(a.data());
    raw.push_back(nullptr);
    pid_ = ::fork();
    if (pid_ == 0) {
        ::dup2(in[0], 0);
        ::dup2(out[1], 1);
        ::execv("/usr/bin/python3", raw.data());
        ::_exit(127);
    }
    ::close(in[0]);
    ::close(out[1]);
    in_ = in[1];
    out_ = out[0];
    port_ = std::stoi(read_line(out_));
}

FaultServer::~FaultServer() {
    ::close(in_);
    ::close(out_);
    ::kill(pid_, SIGKILL);
    ::waitpid(pid_, nullptr, 0);
}

std::string FaultServer::url(const std::string& name, const std::string& host) const {
    return (tls_ ? "https://" : "http://") + host + ":" + std::to_string(port_) + "/" + name;
}

std::size_t FaultServer::count(const std::string& regex) {
    return std::stoul(command("{\"count\": \"" + regex + "\"}"));
}

std::string FaultServer::command(const std::string& json) {
    const std::string line = json + "\n";
    if (::write(in_, line.data(), line.size()) != static_cast<ssize_t>(line.size()))
        throw std::runtime_error("fault_server.py does not listen");
    return read_line(out_);
}

}  // namespace kvcast::test
