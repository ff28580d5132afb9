// Writes one block. rANS encodes backwards, so that the writer first takes down what is to be coded, in the
// decoder's order, and codes it in finish(); or codes the block piece by piece, the last one first. Values
// are referred to, not copied: they must stay until they are coded. Not thread-safe; reuse one object for
// many blocks and it stops allocating.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "codec/entropy/model.h"
#include "codec/fetch_ahead.h"
#include "kernels/ops.h"

namespace kvcast::entropy {

// Ideal code length under the symbol model, in bits.
struct BlockCost {
    double payload = 0;  // strips and floats: the values themselves
    double side = 0;     // words and vectors
};

class BlockWriter {
  public:
    explicit BlockWriter(const kernels::Ops& ops) : ops_(ops) {}

    void word(std::uint16_t value);

    const kernels::Ops& ops() const { return ops_; }

    // See BlockReader::vector. The values are copied. Every value is in [-16384, 16383].
    void vector(std::span<const std::int16_t> values);

    // |value| <= 30000; a class-0 strip must be all zero and is not coded.
    void strip(unsigned spread_class, std::span<const std::int16_t> values);

    // `count` elements, stored as their type is.
    void floats(ExponentModel model, kernels::Dtype dtype, std::size_t count, const void* elements);

    // Ends one piece of a run that shares the coder's states (FORMAT.md, section 5.7). Each piece of a run is
    // ended, the last one too.
    void boundary();

    // Ends the block and starts a new one. Bytes that are handed out are the writer's, until it ends another.
    using Bytes = std::span<const std::uint8_t>;
    Bytes finish();

    // finish() for up to kMostAbreast writers at once, which takes little longer than one of them where their
    // blocks are of like shape. All were made with the same backend.
    static constexpr std::size_t kMostAbreast = 4;
    struct Block {
        BlockWriter* writer = nullptr;
        // Of each piece, or of the block where it is none: what it should have cost is added, which takes
        // longer than the encoding.
        BlockCost* ideal = nullptr;
        Bytes bytes = {};
        // As many as boundaries: they lie one after another, and the first begins with the states.
        std::span<Bytes> pieces = {};
    };
    static void finish_all(std::span<Block> blocks, FetchAhead& ahead);

    // Codes what was taken down; what is taken down after it stands in front of it in the block.
    static void code_all(std::span<Block> blocks, FetchAhead& ahead);

  private:
    enum class Kind : std::uint8_t { kWord, kVector, kStrip, kFloats, kBoundary };
    struct Item {
        Kind kind = Kind::kWord;
        std::uint8_t spread_class = 0;                 // strips and vectors
        kernels::Dtype dtype = kernels::Dtype::kBf16;  // floats
        ExponentModel model = {0, 0};                  // floats
        std::uint32_t word = 0;                        // words
        std::size_t count = 0;
        const void* values = nullptr;  // strips and floats
        std::size_t offset = 0;        // vectors: where in vectors_
    };

    std::size_t greatest_size() const;
    void add_cost(const Item& item, BlockCost& cost) const;
    void make_room();
    Bytes end();
    void tell_apart(Bytes all, std::span<Bytes> pieces);
    static bool alike(const Item& a, const Item& b);
    static bool is_strip(const Item& item) { return item.kind == Kind::kStrip || item.kind == Kind::kVector; }
    kernels::EncodeStrip strip_of(const Item& item) const;
    static kernels::EncodeFloatStrip floats_of(const Item& item);
    void encode(const Item& item);

    // Writers on their way through their items, from the last one on.
    class Abreast;

    kernels::RansEncoder encoder_;
    const kernels::Ops& ops_;
    std::vector<Item> items_;
    std::vector<std::int16_t> vectors_;
    std::vector<std::uint8_t> scratch_;  // coded to its end
    bool begun_ = false;                 // something of the block is coded
    std::vector<std::size_t> behind_;    // bytes behind boundaries, the last one's first
};

}  // namespace kvcast::entropy
