#include "streamer/http/curl_transport.h"

#include <curl/curl.h>
#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cstring>
#include <stdexcept>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "codec/format/chain.h"

namespace kvcast::streamer {
namespace {

constexpr long kRedirects = 5;
constexpr curl_off_t kLongestWait = 86400;  // seconds that a server may ask for; more is as much
constexpr long kBufferBytes = 128 * 1024;

// curl_global_init() is not thread-safe everywhere; a static is.
void initialise() {
    static const CURLcode code = curl_global_init(CURL_GLOBAL_DEFAULT);
    if (code != CURLE_OK) throw std::runtime_error(curl_easy_strerror(code));
}

ErrorCode code_of(CURLcode code) {
    switch (code) {
        case CURLE_OK:
            return ErrorCode::kOk;
        case CURLE_PEER_FAILED_VERIFICATION:
        case CURLE_SSL_CERTPROBLEM:
        case CURLE_SSL_CACERT_BADFILE:
        case CURLE_SSL_ISSUER_ERROR:
        case CURLE_SSL_PINNEDPUBKEYNOTMATCH:
            return ErrorCode::kTls;
        case CURLE_OPERATION_TIMEDOUT:
            return ErrorCode::kTimeout;
        case CURLE_URL_MALFORMAT:
        case CURLE_UNSUPPORTED_PROTOCOL:
            return ErrorCode::kBadArgument;
        case CURLE_TOO_MANY_REDIRECTS:
            return ErrorCode::kHttpStatus;
        case CURLE_WEIRD_SERVER_REPLY:
        case CURLE_BAD_CONTENT_ENCODING:
            return ErrorCode::kProtocol;
        case CURLE_WRITE_ERROR:
        case CURLE_ABORTED_BY_CALLBACK:
            return ErrorCode::kCancelled;
        default:
            return ErrorCode::kNetwork;
    }
}

std::string_view trimmed(std::string_view text) {
    const auto blank = [](char c) { return c == ' ' || c == '\t' || c == '\r' || c == '\n'; };
    while (!text.empty() && blank(text.front())) text.remove_prefix(1);
    while (!text.empty() && blank(text.back())) text.remove_suffix(1);
    return text;
}

std::optional<std::uint64_t> whole_number(std::string_view text) {
    std::uint64_t value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
    return value;
}

bool same_name(std::string_view a, std::string_view b) {
    return std::ranges::equal(a, b, [](char x, char y) { return (x >= 'A' && x <= 'Z' ? x + 32 : x) == y; });
}

// "bytes 5-9/10"
void read_content_range(std::string_view value, HttpHead& head) {
    if (!value.starts_with("bytes ")) return;
    value.remove_prefix(6);
    const std::size_t dash = value.find('-'), slash = value.find('/');
    if (dash == std::string_view::npos || slash == std::string_view::npos) return;
    head.range_first = whole_number(value.substr(0, dash));
    head.object_bytes = whole_number(value.substr(slash + 1));
}

// What a callback of libcurl returns, its own code being C, which nothing may be thrown through.
template <typename Call, typename Failure>
auto shielded(Failure failure, const Call& call) noexcept -> decltype(call()) {
    try {
        return call();
    } catch (...) {
        return failure;
    }
}

}  // namespace

struct CurlTransport::Impl {
    // One exchange. Owned by the table of exchanges; libcurl holds a plain pointer.
    struct Exchange {
        Impl* owner = nullptr;
        Id id = 0;
        CURL* easy = nullptr;
        curl_slist* headers = nullptr;
        HttpHandler* handler = nullptr;  // null once cancelled
        HttpRequest request;
        std::size_t sent = 0;
        HttpHead head;
        bool head_given = false;
        std::array<char, CURL_ERROR_SIZE> error = {};
    };

    EventLoop& loop;
    const HttpOptions options;
    CURLM* multi = nullptr;
    std::unordered_map<Id, std::unique_ptr<Exchange>> exchanges;
    std::vector<CURL*> idle;
    std::vector<int> watched;
    Id next_id = 1;
    EventLoop::TimerId timer = 0;
    bool inside = false;  // libcurl is running, and must not be re-entered
    std::shared_ptr<Impl*> self =
        std::make_shared<Impl*>(this);  // posted tasks find out whether we still are

    Impl(EventLoop& l, HttpOptions o) : loop(l), options(std::move(o)) {
        initialise();
        multi = curl_multi_init();
        if (multi == nullptr) throw std::runtime_error("libcurl: no memory");
        curl_multi_setopt(multi, CURLMOPT_SOCKETFUNCTION, on_socket);
        curl_multi_setopt(multi, CURLMOPT_SOCKETDATA, this);
        curl_multi_setopt(multi, CURLMOPT_TIMERFUNCTION, on_timer);
        curl_multi_setopt(multi, CURLMOPT_TIMERDATA, this);
        curl_multi_setopt(multi, CURLMOPT_PIPELINING, CURLPIPE_MULTIPLEX);
        curl_multi_setopt(multi, CURLMOPT_MAX_HOST_CONNECTIONS,
                          static_cast<long>(options.connections_per_host));
    }

    ~Impl() {
        *self = nullptr;
        for (auto& [id, exchange] : exchanges) {
            detach(*exchange);
            curl_easy_cleanup(exchange->easy);
        }
        for (CURL* easy : idle) curl_easy_cleanup(easy);
        curl_multi_cleanup(multi);
        loop.cancel(timer);
        for (const int fd : watched) loop.watch(fd, {}, {});
    }
    Impl(const Impl&) = delete;
    Impl& operator=(const Impl&) = delete;

    // Neither callback ever fails, since libcurl would end all exchanges then, and (7.88) forget a half-added
    // one's place in its list. What could not be watched stalls, and whoever waits has patience of his own.
    static int on_socket(CURL*, curl_socket_t fd, int what, void* data, void*) {
        auto& self = *static_cast<Impl*>(data);
        return shielded(0, [&] { return self.watch(fd, what); });
    }
    int watch(curl_socket_t fd, int what) {
        if (what == CURL_POLL_REMOVE) {
            std::erase(watched, fd);
            loop.watch(fd, {}, {});
            return 0;
        }
        if (std::ranges::find(watched, fd) == watched.end()) watched.push_back(fd);
        loop.watch(fd, {(what & CURL_POLL_IN) != 0, (what & CURL_POLL_OUT) != 0}, [this, fd](Interest ready) {
            drive(fd, (ready.readable ? CURL_CSELECT_IN : 0) | (ready.writable ? CURL_CSELECT_OUT : 0));
        });
        return 0;
    }

    static int on_timer(CURLM*, long milliseconds, void* data) {
        auto& self = *static_cast<Impl*>(data);
        return shielded(0, [&] { return self.set_timer(milliseconds); });
    }
    int set_timer(long milliseconds) {
        loop.cancel(timer);
        timer = 0;
        if (milliseconds >= 0) {
            timer = loop.after(std::chrono::milliseconds(milliseconds),
                               [this] { drive(CURL_SOCKET_TIMEOUT, 0); });
        }
        return 0;
    }

    void drive(curl_socket_t fd, int events) {
        inside = true;
        int running = 0;
        curl_multi_socket_action(multi, fd, events, &running);
        inside = false;
        collect();
    }

    // Ends what libcurl has finished.
    void collect() {
        int left = 0;
        const std::weak_ptr<Impl*> alive = self;
        while (CURLMsg* message = curl_multi_info_read(multi, &left)) {
            if (message->msg != CURLMSG_DONE) continue;
            Exchange* exchange = nullptr;
            curl_easy_getinfo(message->easy_handle, CURLINFO_PRIVATE, &exchange);
            finish(*exchange, message->data.result);
            if (alive.expired()) return;  // the handler has destroyed the transport
        }
    }

    void finish(Exchange& exchange, CURLcode code) {
        if (code == CURLE_OK && !give_head(exchange)) code = CURLE_WRITE_ERROR;
        HttpResult result;
        long status = 0;
        curl_easy_getinfo(exchange.easy, CURLINFO_RESPONSE_CODE, &status);
        result.http_status = static_cast<int>(status);
        curl_off_t wait = 0;
        if (curl_easy_getinfo(exchange.easy, CURLINFO_RETRY_AFTER, &wait) == CURLE_OK && wait > 0)
            result.retry_after = std::chrono::seconds(std::min(wait, kLongestWait));
        if (code != CURLE_OK) {
            const char* detail = exchange.error[0] != 0 ? exchange.error.data() : curl_easy_strerror(code);
            result.status = {code_of(code), detail};
        }
        HttpHandler* handler = exchange.handler;
        remove(exchange);
        if (handler != nullptr) handler->on_end(result);
    }

    // Returns the easy handle to the idle ones and forgets the exchange.
    void remove(Exchange& exchange) {
        release(exchange);
        exchanges.erase(exchange.id);
    }

    // There is room for it: easy_handle() has made some.
    void release(Exchange& exchange) {
        if (exchange.easy == nullptr) return;
        detach(exchange);
        curl_easy_reset(exchange.easy);
        idle.push_back(exchange.easy);
    }

    void detach(Exchange& exchange) const {
        curl_multi_remove_handle(multi, exchange.easy);
        curl_slist_free_all(exchange.headers);
    }

    static bool give_head(Exchange& exchange) {
        if (exchange.handler == nullptr) return false;
        if (exchange.head_given) return true;
        exchange.head_given = true;
        long status = 0;
        curl_easy_getinfo(exchange.easy, CURLINFO_RESPONSE_CODE, &status);
        exchange.head.status = static_cast<int>(status);
        return exchange.handler->on_head(exchange.head) && exchange.handler != nullptr;
    }

    // The connection is there, and the request is about to be sent.
    static int on_ready(void* user, char*, char*, int, int) {
        const auto& exchange = *static_cast<const Exchange*>(user);
        return shielded(CURL_PREREQFUNC_ABORT, [&] {
            if (exchange.handler != nullptr) exchange.handler->on_connected();
            return CURL_PREREQFUNC_OK;
        });
    }

    static std::size_t on_header(char* data, std::size_t size, std::size_t count, void* user) {
        return shielded(std::size_t{0}, [&] {
            return read_header({data, size * count}, static_cast<Exchange*>(user)->head);
        });
    }
    static std::size_t read_header(std::string_view line, HttpHead& head) {
        if (line.starts_with("HTTP/")) head = {};  // of a redirect, or an interim answer before
        const std::size_t colon = line.find(':');
        if (colon == std::string_view::npos) return line.size();
        const std::string_view name = line.substr(0, colon), value = trimmed(line.substr(colon + 1));
        if (same_name(name, "content-length")) head.content_length = whole_number(value);
        if (same_name(name, "content-range")) read_content_range(value, head);
        if (same_name(name, "etag")) head.etag = value;
        if (same_name(name, "last-modified")) head.last_modified = value;
        return line.size();
    }

    static std::size_t on_body(char* data, std::size_t size, std::size_t count, void* user) {
        auto& exchange = *static_cast<Exchange*>(user);
        const std::span bytes(reinterpret_cast<const std::uint8_t*>(data), size * count);
        return shielded(std::size_t{CURL_WRITEFUNC_ERROR}, [&]() -> std::size_t {
            const bool wanted = give_head(exchange) && exchange.handler->on_body(bytes);
            return wanted ? bytes.size() : CURL_WRITEFUNC_ERROR;
        });
    }

    static std::size_t on_upload(char* out, std::size_t size, std::size_t count, void* user) {
        auto& exchange = *static_cast<Exchange*>(user);
        const std::size_t part = std::min(size * count, exchange.request.body.size() - exchange.sent);
        std::memcpy(out, exchange.request.body.data() + exchange.sent, part);
        exchange.sent += part;
        if (exchange.handler != nullptr) exchange.handler->on_sent();
        return part;
    }

    // A body that a redirect or a lost connection makes libcurl send again.
    static int on_rewind(void* user, curl_off_t offset, int origin) {
        auto& exchange = *static_cast<Exchange*>(user);
        if (origin != SEEK_SET || offset < 0 ||
            static_cast<std::size_t>(offset) > exchange.request.body.size())
            return CURL_SEEKFUNC_FAIL;
        exchange.sent = static_cast<std::size_t>(offset);
        return CURL_SEEKFUNC_OK;
    }

    void add_header(Exchange& exchange, const std::string& line) {
        exchange.headers = curl_slist_append(exchange.headers, line.c_str());
    }

    void set_method(Exchange& exchange) {
        CURL* easy = exchange.easy;
        switch (exchange.request.method) {
            case HttpRequest::Method::kGet:
                break;
            case HttpRequest::Method::kHead:
                curl_easy_setopt(easy, CURLOPT_NOBODY, 1L);
                break;
            case HttpRequest::Method::kDelete:
                curl_easy_setopt(easy, CURLOPT_CUSTOMREQUEST, "DELETE");
                break;
            case HttpRequest::Method::kPut:
                curl_easy_setopt(easy, CURLOPT_UPLOAD, 1L);
                curl_easy_setopt(easy, CURLOPT_INFILESIZE_LARGE,
                                 static_cast<curl_off_t>(exchange.request.body.size()));
                curl_easy_setopt(easy, CURLOPT_READFUNCTION, on_upload);
                curl_easy_setopt(easy, CURLOPT_READDATA, &exchange);
                curl_easy_setopt(easy, CURLOPT_SEEKFUNCTION, on_rewind);
                curl_easy_setopt(easy, CURLOPT_SEEKDATA, &exchange);
                break;
        }
    }

    void set_headers(Exchange& exchange) {
        if (const auto& range = exchange.request.range) {
            const std::string last = range->count ? std::to_string(range->first + *range->count - 1) : "";
            curl_easy_setopt(exchange.easy, CURLOPT_RANGE, fmt::format("{}-{}", range->first, last).c_str());
        }
        if (!exchange.request.if_range.empty())
            add_header(exchange, "If-Range: " + exchange.request.if_range);
        for (const std::string& line : exchange.request.headers) add_header(exchange, line);
        if (options.s3) sign(exchange);
        curl_easy_setopt(exchange.easy, CURLOPT_HTTPHEADER, exchange.headers);
    }

    void sign(Exchange& exchange) {
        curl_easy_setopt(exchange.easy, CURLOPT_AWS_SIGV4,
                         fmt::format("aws:amz:{}:s3", options.s3->region).c_str());
        curl_easy_setopt(exchange.easy, CURLOPT_USERNAME, options.s3->access_key.c_str());
        curl_easy_setopt(exchange.easy, CURLOPT_PASSWORD, options.s3->secret_key.c_str());
        add_header(exchange, "x-amz-content-sha256: " + to_hex(sha256(exchange.request.body)));
        if (!options.s3->session_token.empty())
            add_header(exchange, "x-amz-security-token: " + options.s3->session_token);
    }

    void set_connection(Exchange& exchange) {
        CURL* easy = exchange.easy;
        const bool tls = exchange.request.url.starts_with("https:");
        curl_easy_setopt(easy, CURLOPT_URL, exchange.request.url.c_str());
        curl_easy_setopt(easy, CURLOPT_PROTOCOLS_STR, "http,https");
        curl_easy_setopt(easy, CURLOPT_REDIR_PROTOCOLS_STR, tls ? "https" : "http,https");
        curl_easy_setopt(easy, CURLOPT_FOLLOWLOCATION, 1L);
        curl_easy_setopt(easy, CURLOPT_MAXREDIRS, kRedirects);
        curl_easy_setopt(easy, CURLOPT_HTTP_VERSION,
                         tls                         ? CURL_HTTP_VERSION_2TLS
                         : options.http2_without_tls ? CURL_HTTP_VERSION_2_PRIOR_KNOWLEDGE
                                                     : CURL_HTTP_VERSION_1_1);
        curl_easy_setopt(easy, CURLOPT_PIPEWAIT, 1L);
        curl_easy_setopt(
            easy, CURLOPT_CONNECTTIMEOUT_MS,
            static_cast<long>(
                std::chrono::duration_cast<std::chrono::milliseconds>(options.connect_timeout).count()));
        curl_easy_setopt(easy, CURLOPT_NOSIGNAL, 1L);
        curl_easy_setopt(easy, CURLOPT_QUICK_EXIT, 1L);  // never wait for a resolver that hangs
        curl_easy_setopt(easy, CURLOPT_TCP_KEEPALIVE, 1L);
        curl_easy_setopt(easy, CURLOPT_BUFFERSIZE, kBufferBytes);
        curl_easy_setopt(easy, CURLOPT_USERAGENT, options.user_agent.c_str());
        curl_easy_setopt(easy, CURLOPT_HTTP_CONTENT_DECODING, 0L);
        if (!options.ca_file.empty()) {
            curl_easy_setopt(easy, CURLOPT_CAINFO, options.ca_file.c_str());
            curl_easy_setopt(easy, CURLOPT_CAPATH, nullptr);  // the system's
        }
    }

    void set_callbacks(Exchange& exchange) {
        CURL* easy = exchange.easy;
        curl_easy_setopt(easy, CURLOPT_PRIVATE, &exchange);
        curl_easy_setopt(easy, CURLOPT_ERRORBUFFER, exchange.error.data());
        curl_easy_setopt(easy, CURLOPT_PREREQFUNCTION, on_ready);
        curl_easy_setopt(easy, CURLOPT_PREREQDATA, &exchange);
        curl_easy_setopt(easy, CURLOPT_HEADERFUNCTION, on_header);
        curl_easy_setopt(easy, CURLOPT_HEADERDATA, &exchange);
        curl_easy_setopt(easy, CURLOPT_WRITEFUNCTION, on_body);
        curl_easy_setopt(easy, CURLOPT_WRITEDATA, &exchange);
    }

    CURL* easy_handle() {
        idle.reserve(exchanges.size() + 1);
        if (idle.empty()) {
            CURL* easy = curl_easy_init();
            if (easy == nullptr) throw std::bad_alloc();
            return easy;
        }
        CURL* easy = idle.back();
        idle.pop_back();
        return easy;
    }

    Id start(HttpRequest request, HttpHandler& handler) {
        auto owned = std::make_unique<Exchange>();
        Exchange& exchange = *owned;
        exchange.owner = this;
        exchange.id = next_id++;
        exchange.request = std::move(request);
        exchanges.emplace(exchange.id, std::move(owned));
        try {
            exchange.easy = easy_handle();
            set_connection(exchange);
            set_callbacks(exchange);
            set_method(exchange);
            set_headers(exchange);
            if (inside) {
                later([this, id = exchange.id] { admit(id); });
            } else {
                admit(exchange.id);
            }
        } catch (...) {
            remove(exchange);
            throw;
        }
        exchange.handler = &handler;
        return exchange.id;
    }

    void admit(Id id) {
        const auto it = exchanges.find(id);
        if (it == exchanges.end() || curl_multi_add_handle(multi, it->second->easy) == CURLM_OK) return;
        later([this, id] {
            const auto refused = exchanges.find(id);
            if (refused != exchanges.end()) finish(*refused->second, CURLE_FAILED_INIT);
        });
    }

    void cancel(Id id) {
        const auto it = exchanges.find(id);
        if (it == exchanges.end()) return;
        it->second->handler = nullptr;
        if (!inside) return remove(*it->second);
        later([this, id] {
            const auto again = exchanges.find(id);
            if (again != exchanges.end()) remove(*again->second);
        });
    }

    // Once libcurl has returned.
    void later(std::function<void()> task) {
        loop.post([weak = std::weak_ptr(self), task = std::move(task)] {
            if (const auto alive = weak.lock(); alive && *alive != nullptr) task();
        });
    }
};

CurlTransport::CurlTransport(EventLoop& loop, HttpOptions options)
    : impl_(std::make_unique<Impl>(loop, std::move(options))) {}

CurlTransport::~CurlTransport() = default;

Transport::Id CurlTransport::start(HttpRequest request, HttpHandler& handler) {
    return impl_->start(std::move(request), handler);
}

void CurlTransport::cancel(Id id) {
    impl_->cancel(id);
}

}  // namespace kvcast::streamer
