#include "tests/simt/simt.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "tests/simt/context.h"
#include "tests/simt/races.h"

#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SIMT_ASAN 1
#endif
#endif
#ifdef SIMT_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Static shared memory is a section of its own, whose bounds the linker knows (cuda_runtime.h).
extern "C" {
extern std::byte __start_simt_shared[] __attribute__((weak));  // NOLINT(bugprone-reserved-identifier)
extern std::byte __stop_simt_shared[] __attribute__((weak));   // NOLINT(bugprone-reserved-identifier)
}

namespace simt {

Coordinates threadIdx, blockIdx, blockDim, gridDim;

namespace {

constexpr std::size_t kStackBytes = std::size_t{256} << 10;
constexpr unsigned kMostThreads = 1024;
constexpr std::size_t kMostShared = std::size_t{48} << 10;
constexpr int kPattern = 0xa5;

std::size_t page_bytes() {
    static const auto bytes = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    return bytes;
}

std::byte* map_pages(std::size_t bytes) {
    void* p = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    return static_cast<std::byte*>(p);
}

void open_pages(std::byte* p, std::size_t bytes) {
    if (bytes != 0 && mprotect(p, bytes, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
}

// A stack that faults below its end.
class Stack {
  public:
    Stack() : map_(map_pages(page_bytes() + kStackBytes)) { open_pages(bottom(), kStackBytes); }
    ~Stack() { munmap(map_, page_bytes() + kStackBytes); }
    Stack(const Stack&) = delete;
    Stack& operator=(const Stack&) = delete;

    std::byte* bottom() const { return map_ + page_bytes(); }

  private:
    std::byte* map_;
};

const char* name_of(Primitive p) {
    constexpr std::array names = {
        "__shfl_sync",       "__ballot_sync",       "__all_sync",        "__any_sync",
        "__reduce_add_sync", "__reduce_max_sync",   "__reduce_min_sync", "__reduce_or_sync",
        "mma.sync",          "__syncwarp",          "__syncthreads",     "__syncthreads_or",
        "__syncthreads_and", "__syncthreads_count", "barrier.sync",      "mbarrier.try_wait"};
    return names[static_cast<std::size_t>(p)];
}

bool is_block_wide(Primitive p) {
    return p >= Primitive::kSyncBlock;
}

enum class Mode : std::uint8_t { kNew, kReady, kWaiting, kReturned };

struct Copy {
    void* to;
    const void* from;
    std::size_t bytes;
};

struct GroupEnd {
    std::size_t copies;  // of the thread's, up to here
};

struct Fibre {
    Context context;
    Stack stack;
    WatchedThread watched;
    void* asan_stack = nullptr;
    Mode mode = Mode::kNew;
    // Where it waits, and what it brings and takes away.
    Primitive primitive = Primitive::kSyncWarp;
    unsigned mask = 0;
    std::uint64_t value = 0;
    unsigned source = 0;
    Place place = {"", 0};
    std::uint64_t result = 0;
    // Asynchronous copies that are not made yet, how many are, and where groups of them end.
    std::deque<Copy> copies;
    std::size_t copied = 0;
    std::deque<GroupEnd> groups;
};

// What a thread has found wrong. The sentence is made after it has switched away for good: nothing on its
// stack may need a destructor.
struct Wrong {
    enum class What : std::uint8_t { kNotNamed, kReadsOutside, kCannotMeet, kMessage };

    What what;
    unsigned other;       // thread or lane
    const char* message;  // kMessage
};

struct Machine {
    std::vector<std::unique_ptr<Fibre>> fibres;
    WatchedThread watched_home;
    Order begun, ended;  // blocks
    std::array<Meetings, kMostThreads / kWarp> warp_meetings;
    Meetings block_meetings;
    std::array<Meetings, kBarriers> barrier_meetings;
    bool raced = false;
    unsigned threads = 0;
    unsigned current = 0;
    Fibre* running = nullptr;  // the current thread's
    Context home;
    void* asan_home = nullptr;
    const void* home_bottom = nullptr;
    std::size_t home_bytes = 0;
    const std::function<void()>* body = nullptr;
    std::optional<std::string> failure;
    std::optional<Wrong> wrong;
    std::byte* shared = nullptr;
    Schedule schedule = Schedule::kForwards;
    std::mt19937 random{12345};
    std::string kept;
    std::map<const void*, std::size_t> allowed;  // dynamic shared memory, by kernel
    std::size_t most_shared = kMostOptIn;
    unsigned multiprocessors = kMultiprocessors;
    bool launched = false;
    std::array<unsigned, kBarriers> arrived = {};  // at a barrier, and gone on

    Fibre& self() const { return *running; }
};

Machine the_machine;

Machine& machine() {
    return the_machine;
}

// ---- switching

void swap_to_fibre(Machine& m, Fibre& f) {
    m.running = &f;
#ifdef SIMT_ASAN
    __sanitizer_start_switch_fiber(&m.asan_home, f.stack.bottom(), kStackBytes);
#endif
    f.watched.go_on();
    Context::swap(m.home, f.context);
#ifdef SIMT_ASAN
    __sanitizer_finish_switch_fiber(m.asan_home, nullptr, nullptr);
#endif
}

void to_fibre(Machine& m, unsigned index) {
    m.current = index;
    const Coordinates e = blockDim;
    threadIdx = {index % e.x, index / e.x % e.y, index / e.x / e.y};
    swap_to_fibre(m, *m.fibres[index]);
}

void to_home(Machine& m, bool for_good) {
    Fibre& f = *m.running;
#ifdef SIMT_ASAN
    __sanitizer_start_switch_fiber(for_good ? nullptr : &f.asan_stack, m.home_bottom, m.home_bytes);
#endif
    m.watched_home.go_on();
    Context::swap(f.context, m.home);
#ifdef SIMT_ASAN
    __sanitizer_finish_switch_fiber(f.asan_stack, nullptr, nullptr);
#else
    static_cast<void>(for_good);
#endif
}

void end_thread(Machine& m) {
    m.ended.give();
    if (!m.self().copies.empty()) fail("a thread returns without having waited for its copies");
    m.self().mode = Mode::kReturned;
}

// Nobody returns from it.
void fibre_main() {
    Machine& m = machine();
#ifdef SIMT_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &m.home_bottom, &m.home_bytes);
#endif
    m.begun.take();
    (*m.body)();
    end_thread(m);
    to_home(m, true);
}

void start_fibre(Fibre& f) {
    if (f.mode == Mode::kNew) f.watched.renew();
    f.copies.clear();
    f.copied = 0;
    f.groups.clear();
    f.asan_stack = nullptr;
#ifdef SIMT_ASAN
    // Frames that nobody returned from: all that a failure cut off, or the last two.
    const std::size_t left = f.mode == Mode::kNew ? kStackBytes : page_bytes();
    __asan_unpoison_memory_region(f.stack.bottom() + kStackBytes - left, left);
#endif
    f.context.start(f.stack.bottom(), kStackBytes, fibre_main);
    f.mode = Mode::kReady;
}

// A thread that a failure left where it was.
void cut_off(Machine& m, Fibre& f) {
    if (f.mode == Mode::kReturned) return;
    f.watched.cut_off(m.watched_home, m.ended);
    f.mode = Mode::kNew;
}

// ---- failures

std::string describe(const Machine& m, unsigned thread) {
    const Fibre& f = *m.fibres[thread];
    const std::string who = "thread " + std::to_string(thread);
    if (f.mode == Mode::kReturned) return who + " has returned";
    if (f.mode == Mode::kReady) return who + " runs";
    char mask[40] = "";
    if (!is_block_wide(f.primitive)) std::snprintf(mask, sizeof(mask), " (mask %08x)", f.mask);
    return who + " is at " + name_of(f.primitive) + mask + ", " + f.place.file + ":" +
           std::to_string(f.place.line);
}

std::string in_block(const std::string& message) {
    return "block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
           std::to_string(blockIdx.z) + "): " + message;
}

std::string explain(const Machine& m, const Wrong& w) {
    const std::string who = describe(m, m.current);
    switch (w.what) {
        case Wrong::What::kNotNamed:
            return "a mask does not name its caller: " + who;
        case Wrong::What::kReadsOutside:
            return "a shuffle reads lane " + std::to_string(w.other) + ", which takes no part: " + who;
        case Wrong::What::kCannotMeet:
            return "threads cannot meet: " + who + ", where " + describe(m, w.other);
        default:
            return "thread " + std::to_string(m.current) + ": " + w.message;
    }
}

[[noreturn]] void stop(Wrong wrong) {
    machine().wrong = wrong;
    to_home(machine(), true);
    std::abort();  // nobody comes back
}

// Nobody can go on: the first two threads in different places tell the story.
std::string deadlock(const Machine& m) {
    unsigned waiting = 0;
    while (m.fibres[waiting]->mode != Mode::kWaiting) ++waiting;
    const Fibre& w = *m.fibres[waiting];
    const unsigned warp = waiting / kWarp * kWarp;
    for (unsigned t = 0; t < m.threads; ++t) {
        const Fibre& f = *m.fibres[t];
        const bool wanted =
            is_block_wide(w.primitive) || (t / kWarp * kWarp == warp && (w.mask >> (t - warp) & 1u) != 0);
        const bool there = f.mode == Mode::kWaiting && f.primitive == w.primitive && f.mask == w.mask &&
                           (w.primitive != Primitive::kSyncSome || f.source == w.source);
        if (wanted && !there) return describe(m, waiting) + ", where " + describe(m, t);
    }
    if (w.primitive == Primitive::kSyncMemory)
        return describe(m, waiting) + ", and so are all others: the barrier is for more";
    const unsigned last = std::min(m.threads - warp, kWarp);
    return describe(m, waiting) + ", and its mask names lanes from " + std::to_string(last) +
           " on, which the block does not have";
}

// ---- meeting points

unsigned lanes_of_warp(const Machine& m, unsigned warp) {
    return std::min(kWarp, m.threads - warp * kWarp);
}

void complete(std::span<Fibre* const> lanes, Primitive primitive) {
    std::uint64_t all = 0, any = 0, every = ~std::uint64_t{0}, nonzero = 0;
    std::uint32_t sum = 0, most = 0, least = ~std::uint32_t{0};
    for (std::size_t i = 0; i < lanes.size(); ++i) {
        const Fibre* f = lanes[i];
        if (f == nullptr) continue;
        const auto v = static_cast<std::uint32_t>(f->value);
        any |= f->value;
        every &= f->value != 0 ? ~std::uint64_t{0} : 0;
        if (f->value != 0) {
            ++nonzero;
            if (i < kWarp) all |= std::uint64_t{1} << i;
        }
        sum += v;
        most = std::max(most, v);
        least = std::min(least, v);
    }
    for (Fibre* f : lanes) {
        if (f == nullptr) continue;
        switch (primitive) {
            case Primitive::kShuffle:
                f->result = lanes[f->source]->value;
                break;
            case Primitive::kBallot:
                f->result = all;
                break;
            case Primitive::kAll:
            case Primitive::kSyncBlockAnd:
                f->result = every != 0;
                break;
            case Primitive::kAny:
            case Primitive::kSyncBlockOr:
                f->result = any != 0;
                break;
            case Primitive::kReduceAdd:
                f->result = sum;
                break;
            case Primitive::kReduceMax:
                f->result = most;
                break;
            case Primitive::kReduceMin:
                f->result = least;
                break;
            case Primitive::kReduceOr:
                f->result = any;
                break;
            case Primitive::kSyncBlockCount:
                f->result = nonzero;
                break;
            case Primitive::kMultiply:
            case Primitive::kSyncWarp:
            case Primitive::kSyncBlock:
            case Primitive::kSyncSome:
            case Primitive::kSyncMemory:
                f->result = 0;
                break;
        }
        f->mode = Mode::kReady;
    }
}

// Completes the primitive that the current lane has come to, where it is the last. So do the others.
bool try_warp(Machine& m) {
    const Fibre& own = m.self();
    const unsigned warp = m.current / kWarp;
    std::array<Fibre*, kWarp> lanes = {};
    for (unsigned i = 0; i < kWarp; ++i) {
        if ((own.mask >> i & 1u) == 0) continue;
        if (i >= lanes_of_warp(m, warp)) return false;
        Fibre* f = m.fibres[warp * kWarp + i].get();
        if (f->mode != Mode::kWaiting || f->primitive != own.primitive || f->mask != own.mask) return false;
        lanes[i] = f;
    }
    complete(lanes, own.primitive);
    return true;
}

bool try_block(Machine& m) {
    const Primitive primitive = m.self().primitive;
    const auto threads = std::span(m.fibres).first(m.threads);
    const bool all = std::all_of(threads.begin(), threads.end(), [&](const auto& f) {
        return f->mode == Mode::kWaiting && f->primitive == primitive;
    });
    if (!all) return false;
    std::vector<Fibre*> there;
    for (const auto& f : threads) there.push_back(f.get());
    complete(there, primitive);
    return true;
}

// Those who wait at a barrier, if with those who have gone on they are as many as it is for.
bool try_some(Machine& m, unsigned barrier, unsigned threads) {
    std::vector<Fibre*> there;
    for (unsigned t = 0; t < m.threads; ++t) {
        Fibre* f = m.fibres[t].get();
        if (f->mode == Mode::kWaiting && f->primitive == Primitive::kSyncSome && f->source == barrier)
            there.push_back(f);
    }
    if (there.size() + m.arrived[barrier] != threads) return false;
    m.arrived[barrier] = 0;
    complete(there, Primitive::kSyncSome);
    return true;
}

// What orders the memory of those who come to the same one: made before a thread waits, gone when it goes on.
class Meeting {
  public:
    explicit Meeting(Meetings& meetings) : order_(meetings.current()) { order_.give(); }
    ~Meeting() { order_.take(); }
    Meeting(const Meeting&) = delete;
    Meeting& operator=(const Meeting&) = delete;

  private:
    Order& order_;
};

std::uint64_t wait(Machine& m) {
    if (m.self().mode == Mode::kWaiting) to_home(m, false);
    return m.self().result;
}

// ---- running

void poison_shared(Machine& m, std::byte* end, std::size_t bytes) {
    if (__start_simt_shared != nullptr)
        std::memset(__start_simt_shared, kPattern,
                    static_cast<std::size_t>(__stop_simt_shared - __start_simt_shared));
    m.shared = end - bytes;
    std::memset(m.shared, kPattern, bytes);
}

template <typename Order>
void arrange(Machine& m, Order& order) {
    if (m.schedule == Schedule::kBackwards) std::reverse(order.begin(), order.end());
    if (m.schedule == Schedule::kShuffled) std::shuffle(order.begin(), order.end(), m.random);
}

std::vector<unsigned> numbers(unsigned count) {
    std::vector<unsigned> all(count);
    for (unsigned i = 0; i < count; ++i) all[i] = i;
    return all;
}

void run_block(Machine& m) {
    for (unsigned t = 0; t < m.threads; ++t) start_fibre(*m.fibres[t]);
    m.begun.give();
    m.arrived = {};
    std::vector<unsigned> order = numbers(m.threads);
    arrange(m, order);
    for (bool moved = true; moved && !m.failure;) {
        moved = false;
        if (m.schedule == Schedule::kShuffled) arrange(m, order);
        for (const unsigned t : order) {
            if (m.fibres[t]->mode != Mode::kReady) continue;
            to_fibre(m, t);
            moved = true;
            if (m.wrong) {
                m.failure = in_block(explain(m, *m.wrong));
                return;
            }
        }
    }
    m.ended.take();
    if (m.raced) {
        m.failure = in_block("threads race; the thread sanitizer has said where");
        return;
    }
    const bool over = std::all_of(m.fibres.begin(), m.fibres.begin() + m.threads,
                                  [](const auto& f) { return f->mode == Mode::kReturned; });
    if (!over) m.failure = in_block(deadlock(m));
}

// ---- faults

struct sigaction previous_handler;

void on_fault(int, siginfo_t* info, void*) {
    const Machine& m = machine();
    if (m.launched) {
        char line[160];
        const int n = std::snprintf(line, sizeof(line),
                                    "simt: block (%u, %u, %u), thread %u: access outside memory at %p\n",
                                    blockIdx.x, blockIdx.y, blockIdx.z, m.current, info->si_addr);
        if (n > 0 && write(STDERR_FILENO, line, static_cast<std::size_t>(n)) < 0) _exit(1);
    }
    sigaction(SIGSEGV, &previous_handler, nullptr);  // the access faults again, for the handler before
}

// A fault below a fibre's stack can only be told on another one. That belongs to a thread, and where it has
// one, as with the address sanitizer, which frees at the thread's end whatever stack is set then, it is kept.
void have_signal_stack() {
    thread_local std::array<std::byte, 65536> own;
    stack_t s = {};
    if (sigaltstack(nullptr, &s) != 0 || (s.ss_flags & SS_DISABLE) == 0) return;
    s = {.ss_sp = own.data(), .ss_flags = 0, .ss_size = own.size()};
    sigaltstack(&s, nullptr);
}

void watch_faults() {
    have_signal_stack();
    static const bool once = [] {
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        return sigaction(SIGSEGV, &action, &previous_handler) == 0;
    }();
    static_cast<void>(once);
}

}  // namespace

void set_schedule(Schedule schedule) {
    machine().schedule = schedule;
}

std::optional<std::string> launch(Extent grid, Extent block, std::size_t shared_bytes,
                                  const std::function<void()>& thread, const void* kernel) {
    Machine& m = machine();
    const auto allowed = m.allowed.find(kernel);
    const std::size_t most_shared = std::max(kMostShared, allowed == m.allowed.end() ? 0 : allowed->second);
    if (block.count() == 0 || block.count() > kMostThreads || grid.count() == 0 ||
        shared_bytes > most_shared) {
        return "a launch of " + std::to_string(grid.count()) + " blocks of " + std::to_string(block.count()) +
               " threads with " + std::to_string(shared_bytes) + " bytes of shared memory";
    }
    watch_faults();
    const GuardedBytes shared(shared_bytes);
    while (m.fibres.size() < block.count()) m.fibres.push_back(std::make_unique<Fibre>());
    m.threads = block.count();
    m.body = &thread;
    m.failure.reset();
    m.wrong.reset();
    m.raced = false;
    m.watched_home.be_current();
    m.launched = true;
    blockDim = {block.x, block.y, block.z};
    gridDim = {grid.x, grid.y, grid.z};
    std::vector<unsigned> order = numbers(grid.count());
    arrange(m, order);
    for (const unsigned b : order) {
        blockIdx = {b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y};
        poison_shared(m, shared.data() + shared_bytes, shared_bytes);
        run_block(m);
        if (!m.failure && !shared.intact())
            m.failure = in_block("something is written below dynamic shared memory");
        if (m.failure) break;
    }
    m.launched = false;
    for (unsigned t = 0; t < m.threads; ++t) cut_off(m, *m.fibres[t]);
    m.ended.take();
    return m.failure;
}

std::size_t most_shared() {
    return machine().most_shared;
}

void set_most_shared(std::size_t bytes) {
    machine().most_shared = bytes;
}

unsigned multiprocessors() {
    return machine().multiprocessors;
}

void set_multiprocessors(unsigned count) {
    machine().multiprocessors = count;
}

bool allow_shared(const void* kernel, std::size_t bytes) {
    if (bytes > machine().most_shared) return false;
    machine().allowed[kernel] = bytes;
    return true;
}

// Made between here and there, for all that others know.
void copy_async(void* to, const void* from, std::size_t bytes) {
    reads(from, bytes);
    writes(to, bytes);
    machine().self().copies.push_back({to, from, bytes});
}

void commit_copies() {
    Fibre& f = machine().self();
    f.groups.push_back({f.copied + f.copies.size()});
}

namespace {

// The next copy that has to be made before at most so many groups are open.
std::optional<Copy> next_copy(std::size_t open_groups) {
    Fibre& f = machine().self();
    while (f.groups.size() > open_groups && f.groups.front().copies == f.copied) f.groups.pop_front();
    if (f.groups.size() <= open_groups) return std::nullopt;
    ++f.copied;
    const Copy next = f.copies.front();
    f.copies.pop_front();
    return next;
}

}  // namespace

void wait_copies(std::size_t open_groups) {
    while (const std::optional<Copy> c = next_copy(open_groups)) std::memcpy(c->to, c->from, c->bytes);
}

void record_failure(std::string message) {
    machine().kept = std::move(message);
}

std::string take_failure() {
    return std::exchange(machine().kept, {});
}

std::byte* dynamic_shared() {
    return machine().shared;
}

unsigned lane() {
    return machine().current % kWarp;
}

unsigned warp() {
    return machine().current / kWarp;
}

void fail(const char* message) {
    stop({Wrong::What::kMessage, 0, message});
}

std::uint64_t meet_warp(Primitive primitive, unsigned mask, std::uint64_t value, unsigned source,
                        Place place) {
    Machine& m = machine();
    Fibre& f = m.self();
    f.primitive = primitive;
    f.mask = mask;
    f.value = value;
    f.source = source;
    f.place = place;
    f.mode = Mode::kWaiting;
    if ((mask >> lane() & 1u) == 0) stop({Wrong::What::kNotNamed, 0, nullptr});
    if (primitive == Primitive::kShuffle && (mask >> source & 1u) == 0)
        stop({Wrong::What::kReadsOutside, source, nullptr});
    const unsigned warp = m.current / kWarp * kWarp;
    for (unsigned i = 0; i < lanes_of_warp(m, warp / kWarp); ++i) {
        const Fibre& other = *m.fibres[warp + i];
        const bool named = (mask >> i & 1u) != 0;
        if (!named || warp + i == m.current) continue;
        const bool elsewhere = other.mode == Mode::kWaiting && !is_block_wide(other.primitive) &&
                               (other.mask >> lane() & 1u) != 0 &&
                               (other.primitive != primitive || other.mask != mask);
        if (elsewhere || other.mode == Mode::kReturned) stop({Wrong::What::kCannotMeet, warp + i, nullptr});
    }
    if (primitive != Primitive::kSyncWarp) {
        try_warp(m);
        return wait(m);
    }
    if (kSeesRaces && mask != ~0u)
        fail("races are not followed where some lanes of a warp meet without the others");
    Meetings& meetings = m.warp_meetings[warp / kWarp];
    const Meeting meeting(meetings);
    if (try_warp(m)) meetings.next();
    return wait(m);
}

std::uint64_t meet_block(Primitive primitive, std::uint64_t value, Place place) {
    Machine& m = machine();
    Fibre& f = m.self();
    f.primitive = primitive;
    f.mask = 0;
    f.value = value;
    f.place = place;
    f.mode = Mode::kWaiting;
    const Meeting meeting(m.block_meetings);
    if (try_block(m)) m.block_meetings.next();
    return wait(m);
}

// Every lane publishes its registers, and reads those that its sums need.
void multiply_matrices(std::int32_t (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                       bool signed_a, bool signed_b, Place place) {
    Machine& m = machine();
    struct Lane {
        std::uint32_t a[4], b[2];
    };
    static Lane published[kMostThreads];
    Lane* const warp = published + m.current / kWarp * kWarp;
    Lane& own = published[m.current];
    std::copy(std::begin(a), std::end(a), own.a);
    std::copy(std::begin(b), std::end(b), own.b);
    meet_warp(Primitive::kMultiply, ~0u, 0, 0, place);
    const auto value = [](std::uint32_t word, unsigned byte, bool is_signed) {
        const auto v = static_cast<std::uint8_t>(word >> 8 * byte);
        return is_signed ? std::int32_t{static_cast<std::int8_t>(v)} : std::int32_t{v};
    };
    for (unsigned i = 0; i < 4; ++i) {
        const unsigned row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
        auto sum = static_cast<std::uint32_t>(d[i]);
        for (unsigned k = 0; k < 32; ++k) {
            const std::uint32_t left = warp[row % 8 * 4 + k % 16 / 4].a[row / 8 + k / 16 * 2];
            const std::uint32_t right = warp[column * 4 + k % 16 / 4].b[k / 16];
            sum += static_cast<std::uint32_t>(value(left, k % 4, signed_a) * value(right, k % 4, signed_b));
        }
        d[i] = static_cast<std::int32_t>(sum);
    }
    meet_warp(Primitive::kMultiply, ~0u, 0, 0, place);
}

namespace {

void check_barrier(const Machine& m, unsigned barrier, unsigned threads) {
    if (barrier >= kBarriers || threads == 0 || threads % kWarp != 0)
        fail("barrier.sync names no barrier, or no number of whole warps");
    for (unsigned t = 0; t < m.threads; ++t) {
        const Fibre& other = *m.fibres[t];
        if (other.mode == Mode::kWaiting && other.primitive == Primitive::kSyncSome &&
            other.source == barrier && other.value != threads)
            fail("barrier.sync for another number of threads than those who wait there expect");
    }
}

}  // namespace

void meet_some(unsigned barrier, unsigned threads, Place place) {
    Machine& m = machine();
    check_barrier(m, barrier, threads);
    Fibre& f = m.self();
    f.primitive = Primitive::kSyncSome;
    f.mask = 0;
    f.value = threads;
    f.source = barrier;
    f.place = place;
    f.mode = Mode::kWaiting;
    const Meeting meeting(m.barrier_meetings[barrier]);
    if (try_some(m, barrier, threads)) m.barrier_meetings[barrier].next();
    wait(m);
}

void arrive(unsigned barrier, unsigned threads) {
    Machine& m = machine();
    check_barrier(m, barrier, threads);
    if (++m.arrived[barrier] > threads) fail("barrier.arrive by more threads than the barrier is for");
    m.barrier_meetings[barrier].current().give();
    if (try_some(m, barrier, threads)) m.barrier_meetings[barrier].next();
}

namespace {

// What a barrier in shared memory is here.
struct MemoryBarrier {
    std::uint16_t count, pending;
    std::uint32_t phases;  // that are over
};
static_assert(sizeof(MemoryBarrier) == kMemoryBarrierBytes);

// Whoever uses it knows that it has been made.
MemoryBarrier& barrier_at(void* at) {
    reads(at, kMemoryBarrierBytes);
    auto& b = *static_cast<MemoryBarrier*>(at);
    if (b.count == 0 || b.count > kMostThreads || b.pending == 0 || b.pending > b.count)
        fail("there is no barrier in shared memory where one is used");
    return b;
}

}  // namespace

void make_barrier(void* at, unsigned count) {
    writes(at, kMemoryBarrierBytes);
    if (count == 0 || count > kMostThreads) fail("a barrier in shared memory for no thread, or too many");
    *static_cast<MemoryBarrier*>(at) = {static_cast<std::uint16_t>(count), static_cast<std::uint16_t>(count),
                                        0};
}

namespace {

// Phases come one after the other: two places for what orders memory.
void* order_place(void* at, unsigned parity) {
    return static_cast<std::byte*>(at) + parity * (kMemoryBarrierBytes / 2);
}

}  // namespace

void arrive_at(void* at) {
    MemoryBarrier& b = barrier_at(at);
    give_order(order_place(at, b.phases % 2));
    if (--b.pending != 0) return;
    b.pending = b.count;
    ++b.phases;
    Machine& m = machine();
    for (unsigned t = 0; t < m.threads; ++t) {
        Fibre& f = *m.fibres[t];
        if (f.mode == Mode::kWaiting && f.primitive == Primitive::kSyncMemory &&
            f.value == reinterpret_cast<std::uintptr_t>(at))
            f.mode = Mode::kReady;
    }
}

void wait_at(void* at, unsigned parity, Place place) {
    const MemoryBarrier& b = barrier_at(at);
    Machine& m = machine();
    while (b.phases % 2 == parity) {
        Fibre& f = m.self();
        f.primitive = Primitive::kSyncMemory;
        f.mask = 0;
        f.value = reinterpret_cast<std::uintptr_t>(at);
        f.place = place;
        f.mode = Mode::kWaiting;
        wait(m);
    }
    take_order(order_place(at, parity));
}

}  // namespace simt

#ifdef SIMT_TSAN
// The sanitizer calls it with every report.
extern "C" void __tsan_on_report(void*) {  // NOLINT(bugprone-reserved-identifier)
    simt::machine().raced = true;
}
#endif
