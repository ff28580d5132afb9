// The format is pinned: bytes written and values read are those of the committed vectors.
#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <string_view>

#include "tests/codec/synthetic.h"

namespace kvcast::test {
namespace {

std::vector<std::uint8_t> load(const std::string& name) {
    std::ifstream in(std::string(KVCAST_VECTORS) + "/" + name, std::ios::binary);
    EXPECT_TRUE(in.good()) << name;
    return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

std::vector<std::uint8_t> raw(const Cache& cache) {
    std::vector<std::uint8_t> out;
    for (const auto& plane : cache.planes) out.insert(out.end(), plane.begin(), plane.end());
    return out;
}

// With the backend that KVCAST_KERNELS names, or none.
class Golden : public testing::TestWithParam<Case> {
  protected:
    void SetUp() override {
        const char* wanted = std::getenv("KVCAST_KERNELS");
        if (wanted != nullptr && std::string_view(wanted) != kernels::best_ops().name)
            GTEST_SKIP() << "this machine has no backend '" << wanted << "'";
    }
};

TEST_P(Golden, EncodesToTheCommittedBytes) {
    const Case& c = GetParam();
    EXPECT_EQ(encode(make_cache(c), c), load(c.name + ".kvc"));
}

TEST_P(Golden, WritesTheCommittedCalibration) {
    if (GetParam().calibration.empty()) return;
    EXPECT_EQ(GetParam().calibration, load(GetParam().name + ".kvcal"));
}

TEST_P(Golden, DecodesToTheCommittedValues) {
    const Case& c = GetParam();
    Status status;
    EXPECT_EQ(raw(decode(load(c.name + ".kvc"), {.calibration = c.options.calibration}, status)),
              load(c.name + ".raw"));
    EXPECT_TRUE(status.ok()) << status.message();
}

TEST_P(Golden, DecodesToTheCommittedValuesAtAnotherPosition) {
    const Case& c = GetParam();
    if (c.layout.rope.pairing == RopePairing::kNone) return;
    Status status;
    EXPECT_EQ(raw(decode(load(c.name + ".kvc"), {{}, c.base_position + 1000, c.options.calibration}, status)),
              load(c.name + ".moved.raw"));
    EXPECT_TRUE(status.ok()) << status.message();
}

TEST_P(Golden, IsNoLargerThanTheSizeTableSays) {
    const Case& c = GetParam();
    std::ifstream in(std::string(KVCAST_VECTORS) + "/SIZES");
    std::map<std::string, std::size_t> sizes;
    std::string name;
    for (std::size_t bytes = 0; in >> name >> bytes;) sizes[name] = bytes;
    ASSERT_TRUE(sizes.contains(c.name));
    EXPECT_LE(encode(make_cache(c), c).size(), sizes[c.name]);
}

std::string identifier(const testing::TestParamInfo<Case>& tested) {
    std::string name = tested.param.name;
    std::replace(name.begin(), name.end(), '-', '_');
    return name;
}

INSTANTIATE_TEST_SUITE_P(Vectors, Golden, testing::ValuesIn(conformance_cases()), identifier);

}  // namespace
}  // namespace kvcast::test
