#include "runtime.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#include "../shared_limits.h"

namespace emulation {
namespace {

constexpr int LARGEST_SHARED_BYTES = 227 * 1024;  // what a block of compute capability 9.0 may ask for
constexpr int STATIC_SHARED_BYTES = 48 * 1024;
constexpr int FEW_PASSES = 4;  // collectives that a warp passes before another warp runs, in half of the turns

thread_local Block *running = nullptr;
thread_local std::string last_report = "no launch of this thread has failed";
thread_local uint64_t launches = 0;

uint64_t seed() {
    const char *given = std::getenv("FASTATTN_EMULATION_SEED");
    return given ? std::strtoull(given, nullptr, 10) : 0;
}

std::string coordinates(dim3 at) { return text("(%u,%u,%u)", at.x, at.y, at.z); }

std::string source(const Where &where) {
    const std::string file = where.file_name();
    return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line());
}

}  // namespace

void join(std::vector<uint32_t> &into, const std::vector<uint32_t> &other) {
    for (size_t i = 0; i < into.size(); i++) into[i] = std::max(into[i], other[i]);
}

std::string text(const char *format, ...) {
    char line[512];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    return line;
}

Block &block() { return *running; }

// Compute capability 9.0 where the seed is odd, else 8.6 and 8.9, which have least of those with asynchronous copies.
int shared_bytes_of_device() { return seed() % 2 == 1 ? LARGEST_SHARED_BYTES : 99 * 1024; }

Block::Block(const char *kernel, dim3 grid_, dim3 threads_of_block, int shared_bytes, std::function<void()> body)
    : grid(grid_),
      threads(threads_of_block),
      kernel_(kernel),
      body_(std::move(body)),
      threads_(static_cast<size_t>(threads_of_block.x * threads_of_block.y * threads_of_block.z)),
      warps_(threads_.size() / LANES),
      dynamic_bytes_(shared_bytes) {}

bool Block::run(dim3 index_, uint64_t seed_) {
    index = index_;
    random_.seed(seed_);
    stopped_ = false;
    statics_.clear();
    shared_.assign(static_cast<size_t>((dynamic_bytes_ + 15) / 16 * 16 + STATIC_SHARED_BYTES), 0xFF);
    shared_end_ = (dynamic_bytes_ + 15) / 16 * 16;
    words_.assign(shared_.size() / 4, Word());
    reads_.assign(words_.size() * warps_.size(), 0);
    lane_start_ = static_cast<int>(random_() % LANES);
    lane_step_ = static_cast<int>(random_() % (LANES / 2)) * 2 + 1;
    memory_barriers_.clear();
    products_.assign((warps_.size() + 3) / 4, {});
    for (Barrier &barrier : barriers_) {
        barrier = Barrier();
        barrier.clock.assign(warps_.size(), 0);
    }
    for (size_t w = 0; w < warps_.size(); w++) {
        warps_[w].ready = LANES;
        warps_[w].returned = warps_[w].arrived = 0;
        warps_[w].clock.assign(warps_.size(), 0);
        warps_[w].clock[w] = 1;
        warps_[w].open.clear();
        warps_[w].groups.clear();
        warps_[w].fenced = false;
        warps_[w].products = warps_[w].registers = 0;
    }
    for (size_t n = 0; n < threads_.size(); n++) {
        Thread &thread = threads_[n];
        const auto number = static_cast<unsigned>(n);
        thread.index = dim3(number % threads.x, number / threads.x % threads.y, number / threads.x / threads.y);
        thread.number = static_cast<int>(n);
        thread.warp = static_cast<int>(n) / LANES;
        thread.lane = static_cast<int>(n) % LANES;
        thread.state = State::ready;
        thread.collectives = thread.shares = 0;
        thread.open.clear();
        thread.groups.clear();
        thread.fibre.prepare(n, &Block::enter, this);
    }
    Block *outer = running;
    running = this;
    std::vector<int> candidates;
    while (!stopped_) {
        candidates.clear();
        int returned = 0;
        for (size_t w = 0; w < warps_.size(); w++) {
            if (warps_[w].ready > 0) candidates.push_back(static_cast<int>(w));
            returned += warps_[w].returned;
        }
        if (candidates.empty()) {
            if (returned < static_cast<int>(threads_.size()))
                note_deadlock();
            else
                check_finished();
            break;
        }
        const uint64_t draw = random_();
        run_warp(candidates[draw % candidates.size()], (draw >> 32) & 1 ? 1 << 30 : 1 + static_cast<int>((draw >> 33) % FEW_PASSES));
    }
    running = outer;
    return report_.empty();
}

// A pass gives each ready lane a turn, until it waits: the lanes meet at the next collective.
void Block::run_warp(int number, int passes) {
    Warp &warp = warps_[static_cast<size_t>(number)];
    for (; passes > 0 && warp.ready > 0; passes--) {
        for (int k = 0; k < LANES; k++) {
            const int lane = (lane_start_ + k * lane_step_) % LANES;
            current_ = number * LANES + lane;
            if (current().state != State::ready) continue;
            current().fibre.enter(&scheduler_);
            if (stopped_) return;
        }
    }
}

void Block::enter(void *block) {
    auto &self = *static_cast<Block *>(block);
    self.body_();
    Thread &thread = self.current();
    Warp &warp = self.warps_[static_cast<size_t>(thread.warp)];
    thread.groups.push_back(std::move(thread.open));
    for (const std::vector<AsyncCopy> &group : thread.groups)
        if (!group.empty()) self.fail("returns with asynchronous copies under way", group[0].where);
    if (!warp.open.empty()) self.fail("returns with a product under way", warp.open[0].where);
    for (const std::vector<Wgmma> &group : warp.groups)
        if (!group.empty()) self.fail("returns with a product under way", group[0].where);
    thread.state = State::returned;
    warp.ready--;
    warp.returned++;
    for (;;) self.yield();
}

void Block::yield() { current().fibre.leave(scheduler_); }

std::string Block::place(const Thread &thread, const Where &where) const {
    return text("%s, block %s, thread %s at %s: ", kernel_, coordinates(index).c_str(), coordinates(thread.index).c_str(),
                source(where).c_str());
}

void Block::fail(const std::string &what, const Where &where) {
    report_ = place(current(), where) + what;
    stopped_ = true;
    for (;;) yield();
}

void Block::note_deadlock() {
    struct Group {
        int threads = 0, first = 0;
    };
    std::map<std::string, Group> groups;
    for (const Thread &thread : threads_) {
        std::string where;
        const Warp &warp = warps_[static_cast<size_t>(thread.warp)];
        if (thread.state == State::at_barrier)
            where = text("at barrier %d (%d of %d threads there), %s", thread.barrier, barriers_[thread.barrier].arrived,
                         barriers_[thread.barrier].expected, source(thread.where).c_str());
        else if (thread.state == State::at_memory_barrier)
            where = text("at the barrier in byte %d of shared memory (%d arrivals missing), %s", thread.barrier,
                         memory_barriers_[thread.barrier].pending, source(thread.where).c_str());
        else if (thread.state == State::at_warp)
            where = text("at %s of warp %d (%d of %d lanes there), %s", warp.collective, thread.warp, warp.arrived, LANES,
                         source(thread.where).c_str());
        else
            where = "returned";
        Group &group = groups[where];
        if (group.threads++ == 0) group.first = thread.number;
    }
    report_ = text("%s, block %s: deadlock", kernel_, coordinates(index).c_str());
    for (const auto &[where, group] : groups) report_ += text("; %d threads from %d on %s", group.threads, group.first, where.c_str());
    stopped_ = true;
}

// --- Warps and barriers -------------------------------------------------------------------------------------------------------------------

bool Block::join_collective(Thread &thread, Warp &warp, const char *what, const Where &where) {
    if (warp.arrived == 0) {
        warp.collective = what;
        warp.where = where;
    } else if (warp.where.line() != where.line() || std::strcmp(warp.collective, what) != 0) {
        fail(text("lane %d calls %s while other lanes of the warp wait at %s, %s", thread.lane, what, warp.collective, source(warp.where).c_str()),
             where);
    }
    thread.where = where;
    thread.collectives++;
    if (++warp.arrived == LANES) return true;
    thread.state = State::at_warp;
    warp.ready--;
    return false;
}

void Block::release_warp(Warp &warp, int number) {
    warp.arrived = 0;
    warp.ready = LANES;
    for (int lane = 0; lane < LANES; lane++) threads_[static_cast<size_t>(number * LANES + lane)].state = State::ready;
}

bool Block::barrier(int number, int expected, bool waits, bool vote, const Where &where) {
    Thread &thread = current();
    Warp &warp = warps_[static_cast<size_t>(thread.warp)];
    if (number < 0 || number >= BARRIERS) fail(text("barrier %d: there are 0 to %d", number, BARRIERS - 1), where);
    if (expected <= 0 || expected % LANES != 0 || expected > static_cast<int>(threads_.size()))
        fail(text("barrier %d for %d threads in a block of %zu: not whole warps of it", number, expected, threads_.size()), where);
    Barrier &barrier = barriers_[number];
    if (barrier.arrived > 0 && barrier.expected != expected)
        fail(text("barrier %d for %d threads, and others wait there for %d", number, expected, barrier.expected), where);
    barrier.expected = expected;
    barrier.vote = barrier.vote || vote;
    join(barrier.clock, warp.clock);
    thread.collectives++;
    thread.where = where;
    thread.barrier = number;
    barrier.arrived++;
    if (!waits) {
        // What the warp does from here on is not covered by this arrival.
        if (thread.lane == LANES - 1) warp.clock[static_cast<size_t>(thread.warp)]++;
        if (barrier.arrived == expected) release_barrier(number);
        return false;
    }
    barrier.waiting.push_back(thread.number);
    thread.state = State::at_barrier;
    warp.ready--;
    if (barrier.arrived == expected)
        release_barrier(number);
    else
        yield();
    return barrier.outcome;
}

void Block::release_barrier(int number) {
    Barrier &barrier = barriers_[number];
    std::vector<bool> seen(warps_.size(), false);
    for (const int waiting : barrier.waiting) {
        Thread &thread = threads_[static_cast<size_t>(waiting)];
        const auto w = static_cast<size_t>(thread.warp);
        thread.state = State::ready;
        warps_[w].ready++;
        if (seen[w]) continue;
        seen[w] = true;
        join(warps_[w].clock, barrier.clock);
        warps_[w].clock[w]++;
    }
    barrier.outcome = barrier.vote;
    barrier.vote = false;
    barrier.arrived = 0;
    barrier.waiting.clear();
    std::fill(barrier.clock.begin(), barrier.clock.end(), 0);
}

// --- Shared memory ------------------------------------------------------------------------------------------------------------------------

unsigned char *Block::static_shared(const void *tag, int bytes) {
    for (const auto &[known, at] : statics_)
        if (known == tag) return shared_.data() + at;
    const int at = shared_end_;
    shared_end_ += (bytes + 15) / 16 * 16;
    const int most = asks_for_shared_bytes(dynamic_bytes_) ? LARGEST_SHARED_BYTES : SHARED_BYTES_WITHOUT_ASKING;
    if (shared_end_ > std::min(most, static_cast<int>(shared_.size())))
        fail(text("%d bytes of static and dynamic shared memory, and the launch asks for %d at most", shared_end_, most), Where::current());
    statics_.emplace_back(tag, at);
    return shared_.data() + at;
}

void Block::check_shared(const void *address, int bytes, bool writes, const Where &where) {
    const Thread &thread = current();
    const auto me = static_cast<size_t>(thread.warp);
    const std::vector<uint32_t> &clock = warps_[me].clock;
    const size_t first = static_cast<size_t>(static_cast<const unsigned char *>(address) - shared_.data()) / 4;
    const size_t last = static_cast<size_t>(static_cast<const unsigned char *>(address) + bytes - 1 - shared_.data()) / 4;
    const char *verb = writes ? "writes" : "reads";
    for (size_t i = first; i <= last; i++) {
        Word &word = words_[i];
        const int offset = static_cast<int>(i) * 4;
        if (word.copying) fail(text("%s shared memory (byte %d) that an unfinished asynchronous copy owns", verb, offset), where);
        if (word.write_warp >= 0) {
            const bool same = word.write_warp == thread.warp;
            if (!same && word.write_clock > clock[static_cast<size_t>(word.write_warp)])
                fail(text("race: %s shared memory (byte %d) that warp %d wrote at line %d with no barrier in between", verb, offset,
                          word.write_warp, word.write_line),
                     where);
            if (same && !writes && word.write_lane != thread.lane && word.write_collectives >= thread.collectives)
                fail(text("race: reads shared memory (byte %d) that lane %d of this warp wrote at line %d, with nothing that joins the lanes in between",
                          offset, word.write_lane, word.write_line),
                     where);
        }
        if (!writes) {
            last_read(i, thread.warp) = clock[me];
            continue;
        }
        for (size_t w = 0; w < warps_.size(); w++)
            if (w != me && reads_[i * warps_.size() + w] > clock[w])
                fail(text("race: writes shared memory (byte %d) that warp %zu reads with no barrier in between", offset, w), where);
        word.write_warp = static_cast<int8_t>(thread.warp);
        word.write_lane = static_cast<int8_t>(thread.lane);
        word.write_clock = clock[me];
        word.write_collectives = thread.collectives;
        word.write_shares = thread.shares;
        word.write_line = static_cast<uint16_t>(where.line());
    }
}

void Block::issue(const AsyncCopy &copy) {
    check_shared(copy.to, 16, true, copy.where);
    for (int i = 0; i < 4; i++) word(copy.to + 4 * i).copying = true;
    // Until it lands nobody may count on what lies there: not on the data, not on what was there before.
    std::memset(copy.to, 0xFF, 16);
    current().open.push_back(copy);
}

void Block::commit() {
    Thread &thread = current();
    thread.groups.push_back(std::move(thread.open));
    thread.open.clear();
}

void Block::wait(size_t left, const Where &where) {
    Thread &thread = current();
    while (thread.groups.size() > left) {
        std::vector<AsyncCopy> landing = std::move(thread.groups.front());
        thread.groups.erase(thread.groups.begin());
        std::shuffle(landing.begin(), landing.end(), random_);
        for (const AsyncCopy &copy : landing) {
            for (int i = 0; i < 4; i++) word(copy.to + 4 * i).copying = false;
            std::memcpy(copy.to, copy.from, 16);
            check_shared(copy.to, 16, true, where);
        }
    }
}

// --- Launches -----------------------------------------------------------------------------------------------------------------------------

cudaError_t run_grid(const char *kernel, dim3 grid, dim3 threads, int shared_bytes, const std::function<void()> &body) {
    const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z, count = uint64_t(threads.x) * threads.y * threads.z;
    last_report.clear();
    if (blocks == 0 || grid.y > 65535 || grid.z > 65535)
        last_report = text("%s: grid %s has no blocks or exceeds 65535 in y or z", kernel, coordinates(grid).c_str());
    else if (count == 0 || count > 1024 || count % LANES != 0)
        last_report = text("%s: a block of %s threads: whole warps, at most 1024 threads", kernel, coordinates(threads).c_str());
    else if (shared_bytes > LARGEST_SHARED_BYTES)
        last_report = text("%s: %d bytes of shared memory, and a block has at most %d", kernel, shared_bytes, LARGEST_SHARED_BYTES);
    if (!last_report.empty()) return cudaErrorLaunchFailure;
    std::mt19937_64 random(seed() * 0x9E3779B97F4A7C15u + launches++);
    Block block(kernel, grid, threads, shared_bytes, body);
    // Every block once, from a random one on in random strides: no block may count on another.
    uint64_t stride = random() % blocks | 1, at = random() % blocks;
    while (std::__gcd(stride, blocks) != 1) stride += 2;
    for (uint64_t n = 0; n < blocks; n++, at = (at + stride) % blocks) {
        const dim3 index(static_cast<unsigned>(at % grid.x), static_cast<unsigned>(at / grid.x % grid.y),
                         static_cast<unsigned>(at / grid.x / grid.y));
        if (!block.run(index, random())) {
            last_report = block.report();
            return cudaErrorLaunchFailure;
        }
    }
    return cudaSuccess;
}

}  // namespace emulation

const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess:
            return "no error";
        case cudaErrorInvalidValue:
            return "invalid argument";
        case cudaErrorInvalidConfiguration:
            return "invalid configuration argument";
        default:
            return emulation::last_report.c_str();
    }
}

cudaError_t cudaGetDeviceCount(int *count) {
    *count = 1;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int *device) {
    *device = 0;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int device) {
    if (device != 0) return cudaErrorInvalidValue;
    *properties = {"fastattn's emulation", 8, 0, 2, 0};
    return cudaSuccess;
}
