// What runs behind the threads' back on compute capability 9.0: products of warpgroups, and barriers in shared memory.
#include <primitives/wgmma.cuh>

namespace emulation {
namespace {

constexpr int REGISTERS_OF_A_BLOCK = 65536;
constexpr int WARPS_OF_A_GROUP = 4, ROWS = 16, DEPTH = 16, GROUP_ROWS = WARPS_OF_A_GROUP * ROWS;

// The chunks of 16 bytes of a row of 128 are exchanged by the number of the row, which is that of 128 bytes of shared memory.
int swizzled(int at) { return at ^ (at >> 7 & 7) << 4; }

float value_of(const unsigned char *at, bool is_float16) {
    uint16_t bits;
    std::memcpy(&bits, at, sizeof bits);
    return is_float16 ? to_float(float16{bits}) : to_float(bfloat16{bits});
}

// Element (row, k) of a matrix that lies by rows: eight rows of 128 bytes, then the next eight.
void read_by_rows(const SharedMatrix &matrix, int rows, const Wgmma &product, Block &block, float *to) {
    for (int row = 0; row < rows; row++)
        for (int chunk = 0; chunk < DEPTH; chunk += 8) {
            const unsigned char *data = block.operand(matrix, swizzled(matrix.first + row / 8 * 1024 + row % 8 * 128 + chunk * 2), product.where);
            for (int i = 0; i < 8; i++) to[row * DEPTH + chunk + i] = value_of(data + 2 * i, product.float16);
        }
}
// Element (k, column), likewise by rows: the columns go on in the next panel after 64. `to` is the transpose.
void read_by_columns(const SharedMatrix &matrix, int columns, const Wgmma &product, Block &block, float *to) {
    for (int k = 0; k < DEPTH; k++)
        for (int column = 0; column < columns; column += 8) {
            const int at = matrix.first + column / 64 * matrix.panel_bytes + k / 8 * 1024 + k % 8 * 128 + column % 64 * 2;
            const unsigned char *data = block.operand(matrix, swizzled(at), product.where);
            for (int i = 0; i < 8; i++) to[(column + i) * DEPTH + k] = value_of(data + 2 * i, product.float16);
        }
}

}  // namespace

// --- Products -----------------------------------------------------------------------------------------------------------------------------

const unsigned char *Block::operand(const SharedMatrix &matrix, int at, const Where &where) {
    if (at < matrix.low || at + 16 > matrix.high)
        fail(text("out of bounds: a product reads byte %d of dynamic shared memory, and its operand has those from %d to %d", at, matrix.low,
                  matrix.high),
             where);
    const unsigned char *address = dynamic_shared() + at;
    check_shared(address, 16, false, where);
    for (int i = 0; i < 16; i += 4) {
        const Word &written = word(address + i);
        if (written.write_warp < 0) continue;
        const Thread &writer = threads_[static_cast<size_t>(written.write_warp * LANES + written.write_lane)];
        if (writer.shares <= written.write_shares)
            fail(text("a product reads shared memory (byte %d) that thread %d wrote at line %d and did not share with the asynchronous proxy", at,
                      writer.number, written.write_line),
                 where);
    }
    return address;
}

void multiply(const Wgmma &product, int warp, Block &block) {
    const int columns = 8 * product.column_tiles;
    std::vector<float> left(GROUP_ROWS * DEPTH), right(static_cast<size_t>(columns * DEPTH));
    const float *own = left.data();
    if (product.a[0]) {
        for (int lane = 0; lane < LANES; lane++)
            for (int i = 0; i < 4; i++) {
                float *to = left.data() + (lane / 4 + 8 * (i % 2)) * DEPTH + lane % 4 * 2 + 8 * (i / 2);
                if (product.float16)
                    unpack_pair<float16>(product.a[lane][i], to[0], to[1]);
                else
                    unpack_pair<bfloat16>(product.a[lane][i], to[0], to[1]);
            }
    } else {
        // All rows: the warps of a group may be served together.
        read_by_rows(product.left, GROUP_ROWS, product, block, left.data());
        own += warp % WARPS_OF_A_GROUP * ROWS * DEPTH;
    }
    if (product.right_by_rows)
        read_by_columns(product.right, columns, product, block, right.data());
    else
        read_by_rows(product.right, columns, product, block, right.data());
    const int registers = 4 * product.column_tiles;
    for (int lane = 0; lane < LANES; lane++)
        for (int i = 0; i < registers; i++) {
            const float *a = own + (lane / 4 + 8 * (i / 2 % 2)) * DEPTH, *b = right.data() + (i / 4 * 8 + lane % 4 * 2 + i % 2) * DEPTH;
            float sum = 0.0f;
            for (int k = 0; k < DEPTH; k++) sum += a[k] * b[k];
            float before = 0.0f;
            if (product.add) before = product.saved.empty() ? product.c[lane][i] : product.saved[static_cast<size_t>(lane * registers + i)];
            product.c[lane][i] = before + sum;
        }
}

void Block::issue_product(Wgmma &&product) {
    Warp &warp = warp_of_current();
    if (!warp.fenced) fail("a product without a fence of its registers since the last wait", product.where);
    std::vector<Wgmma> &of_group = products_[static_cast<size_t>(current().warp / WARPS_OF_A_GROUP)];
    const auto number = static_cast<size_t>(warp.products++);
    if (number == of_group.size())
        of_group.push_back(product);
    else if (!product.same_as(of_group[number]))
        fail(text("product %zu of the warp is another than that of a warp of the same warpgroup, issued at line %u", number,
                  of_group[number].where.line()),
             product.where);
    if (warp.open.empty() && warp.groups.empty() && random_() % 2 == 0) {
        multiply(product, current().warp, *this);
        return;
    }
    bool owned = false;
    const auto look = [&](const std::vector<Wgmma> &group) {
        for (const Wgmma &other : group) owned = owned || other.c[0] == product.c[0];
    };
    for (const std::vector<Wgmma> &group : warp.groups) look(group);
    look(warp.open);
    if (!owned) {
        const int registers = 4 * product.column_tiles;
        for (float *c : product.c) {
            product.saved.insert(product.saved.end(), c, c + registers);
            std::fill(c, c + registers, bits_float(0x7FFFFFFF));
        }
    }
    warp.open.push_back(std::move(product));
}

void Block::commit_products() {
    Warp &warp = warp_of_current();
    if (warp.open.empty() && warp.groups.empty()) return;  // what was issued has run
    warp.groups.push_back(std::move(warp.open));
    warp.open.clear();
}

void Block::wait_products(size_t left) {
    Warp &warp = warp_of_current();
    warp.fenced = false;
    while (warp.groups.size() > left) {
        for (const Wgmma &product : warp.groups.front()) multiply(product, current().warp, *this);
        warp.groups.erase(warp.groups.begin());
    }
}

void Block::claim(const float *c, const Where &where) {
    Warp &warp = warp_of_current();
    const auto look = [&](const std::vector<Wgmma> &group) {
        for (const Wgmma &product : group)
            if (product.c[current().lane] == c) fail("asks for accumulators of a product that is under way", where);
    };
    for (const std::vector<Wgmma> &group : warp.groups) look(group);
    look(warp.open);
}

void Block::set_registers(int count, const Where &where) {
    if (count % 8 != 0 || count < 24 || count > 256) fail(text("%d registers: a multiple of 8 from 24 to 256", count), where);
    warp_of_current().registers = count;
}

void Block::check_finished() {
    const int at_launch = std::min(REGISTERS_OF_A_BLOCK / static_cast<int>(threads_.size()) / 8 * 8, 255), warps = static_cast<int>(warps_.size());
    int registers = 0;
    for (const Warp &warp : warps_) registers += warp.registers > 0 ? warp.registers : at_launch;
    if (registers > warps * at_launch) {
        report_ = text("%s: its warps ask for %d registers a thread on average, and were launched with %d", kernel_, (registers + warps - 1) / warps,
                       at_launch);
        stopped_ = true;
    }
    for (size_t w = 0; w < warps_.size() && !stopped_; w++) {
        const size_t first = w / WARPS_OF_A_GROUP * WARPS_OF_A_GROUP;
        if (warps_[w].products == warps_[first].products) continue;
        report_ = text("%s: warp %zu took part in %d products, and warp %zu of the same warpgroup in %d", kernel_, w, warps_[w].products, first,
                       warps_[first].products);
        stopped_ = true;
    }
}

// --- Barriers in shared memory ------------------------------------------------------------------------------------------------------------

void Block::prepare_barrier(const void *at, int arrivals, const Where &where) {
    check_shared(at, 8, true, where);
    MemoryBarrier &barrier = memory_barriers_[static_cast<int>(static_cast<const unsigned char *>(at) - shared_.data())];
    barrier = {arrivals, arrivals, 0, {}, std::vector<uint32_t>(warps_.size(), 0), std::vector<uint32_t>(warps_.size(), 0)};
}

MemoryBarrier &Block::memory_barrier(const void *at, const Where &where) {
    const int byte = static_cast<int>(static_cast<const unsigned char *>(at) - shared_.data());
    const auto found = memory_barriers_.find(byte);
    if (found == memory_barriers_.end()) fail(text("byte %d of shared memory holds no barrier: nobody prepared it", byte), where);
    check_shared(at, 8, false, where);
    return found->second;
}

void Block::arrive(const void *at, const Where &where) {
    MemoryBarrier &barrier = memory_barrier(at, where);
    Warp &warp = warp_of_current();
    join(barrier.arriving, warp.clock);
    warp.clock[static_cast<size_t>(current().warp)]++;  // what the warp does from here on is not covered by this arrival
    if (--barrier.pending > 0) return;
    barrier.pending = barrier.expected;
    barrier.phase++;
    barrier.complete = barrier.arriving;
    for (const int waiting : barrier.waiting) {
        Thread &thread = threads_[static_cast<size_t>(waiting)];
        thread.state = State::ready;
        warps_[static_cast<size_t>(thread.warp)].ready++;
        join(warps_[static_cast<size_t>(thread.warp)].clock, barrier.complete);
    }
    barrier.waiting.clear();
}

bool Block::is_phase_complete(const void *at, unsigned parity, const Where &where) {
    const MemoryBarrier &barrier = memory_barrier(at, where);
    if ((barrier.phase & 1) == parity) return false;
    join(warp_of_current().clock, barrier.complete);
    return true;
}

void Block::wait_phase(const void *at, unsigned parity, const Where &where) {
    if (is_phase_complete(at, parity, where)) return;
    MemoryBarrier &barrier = memory_barrier(at, where);
    Thread &thread = current();
    thread.where = where;
    thread.barrier = static_cast<int>(static_cast<const unsigned char *>(at) - shared_.data());
    thread.state = State::at_memory_barrier;
    warp_of_current().ready--;
    barrier.waiting.push_back(thread.number);
    yield();
}

}  // namespace emulation
