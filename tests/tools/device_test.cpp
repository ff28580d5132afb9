// kvenc and kvdec with --device cuda, as a user runs them: linked with the emulator they give the CPU's
// bytes, and where there is no device they say what is missing.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>

#include <cstdlib>

#include "tests/codec/synthetic.h"
#include "tests/codec/synthetic_calibration.h"
#include "tests/tools/scratch.h"
#include "tools/common/kv_cache.h"
#include "tools/common/kv_file.h"

namespace kvcast::tools {
namespace {

using testing::HasSubstr;

const std::string kTools = KVCAST_TOOLS;        // the build's own
const std::string kEmulated = KVCAST_EMULATED;  // linked with the emulator

struct Ran {
    int code = 0;
    std::string said;
};

class DeviceTools : public testing::Test {
  protected:
    Ran run(const std::string& command) const {
        const std::string log = folder_ / "log";
        const int ended = std::system((command + " >" + log + " 2>&1").c_str());
        return {WEXITSTATUS(ended), contents(log)};
    }

    void expect_success(const std::string& command) const {
        const Ran ran = run(command);
        EXPECT_EQ(ran.code, 0) << command << '\n' << ran.said;
    }

    // A small cache as a file.
    std::string make_input() const {
        const Layout layout = test::make_layout(3, {{2, 16}, {2, 16}}, Dtype::kBf16, RopePairing::kHalf);
        const test::Cache cache = test::make_cache(layout, 75, test::Content::kGaussian);
        KvCache kv = {layout, "test model", 40, cache.ids, {}};
        kv.planes.resize(layout.planes.size());
        for (std::size_t i = 0; i < cache.planes.size(); ++i) {
            const auto bytes = std::as_bytes(std::span(cache.planes[i]));
            auto& plane = kv.planes[i % layout.planes.size()];
            plane.insert(plane.end(), bytes.begin(), bytes.end());
        }
        save_kv(folder_ / "kv.safetensors", kv);
        return folder_ / "kv.safetensors";
    }

    // One that fits the file.
    std::string make_calibration(const std::string& input) const {
        const KvInput kv(std::make_unique<SafetensorsReader>(input));
        const auto bytes = test::calibration_bytes(test::make_calibration_data(kv.layout(), {{1, 1}, 6, 2}));
        store(folder_ / "c.kvcal", {reinterpret_cast<const char*>(bytes.data()), bytes.size()});
        return folder_ / "c.kvcal";
    }

    ScratchDirectory folder_;
};

TEST_F(DeviceTools, WriteTheFilesThatTheCpuWrites) {
    const std::string input = make_input(), calibration = " --calibration " + make_calibration(input);
    const std::string cpu = folder_ / "cpu", device = folder_ / "device";
    for (const std::string& profile : {std::string(" -l 3"), std::string(" -p lossless"),
                                       " -p klt -l 2 --tail-tokens 9 --tail-level 1" + calibration}) {
        const std::string arguments = input + profile + " -q -c 32 -o ";
        expect_success(kTools + "/kvenc " + arguments + cpu);
        expect_success(kEmulated + "/kvenc_on_simt --device cuda " + arguments + device);
        EXPECT_EQ(contents(device), contents(cpu)) << profile;

        const std::string with = profile.find("klt") != std::string::npos ? calibration : "";
        for (const char* part :
             {"", " --layers 1-2 --tokens 5-40 --base-position 100 --dtype fp32", " --layers 0"}) {
            const std::string options = cpu + with + part + " -q -o ";
            expect_success(kTools + "/kvdec " + options + folder_ / "cpu.safetensors");
            expect_success(kEmulated + "/kvdec_on_simt --device cuda " + options +
                           folder_ / "device.safetensors");
            EXPECT_EQ(contents(folder_ / "device.safetensors"), contents(folder_ / "cpu.safetensors"))
                << profile << part;
        }
    }
}

TEST_F(DeviceTools, TellDamageFromOtherFailures) {
    const std::string input = make_input(), chunks = folder_ / "chunks", out = folder_ / "out.safetensors";
    expect_success(kTools + "/kvenc " + input + " -q -o " + chunks);
    std::string bytes = contents(chunks);
    bytes.back() = static_cast<char>(bytes.back() ^ 1);
    store(chunks, bytes);
    const Ran damaged = run(kEmulated + "/kvdec_on_simt --device cuda " + chunks + " -o " + out);
    EXPECT_EQ(damaged.code, 3);
    EXPECT_THAT(damaged.said, HasSubstr("block-checksum"));
    EXPECT_FALSE(std::filesystem::exists(out));
}

// What bench/device runs, on a device that says nothing about speed: rows are verified.
TEST_F(DeviceTools, BenchVerifiesItsRows) {
    const std::string input = make_input(), out = folder_ / "rows.json";
    const std::string bench =
        kEmulated + "/bench_device_on_simt " + input + " --values 30000 --repetitions 1";
    const std::string calibration = " --calibration " + make_calibration(input);
    for (const std::string& only : {std::string("delta 3"), "klt 1'" + calibration}) {
        const bool klt = only.starts_with("klt");
        const Ran ran = run(bench + " --only 'sample/" + only + (klt ? "" : "'") + " -o " + out);
        EXPECT_EQ(ran.code, 0) << ran.said;
        EXPECT_THAT(ran.said, HasSubstr(klt ? "klt 1 r1" : "decode bf16 pages"));
        EXPECT_THAT(contents(out), HasSubstr("\"verified\": true"));
        EXPECT_THAT(contents(out), HasSubstr("\"operation\": \"encode\""));
    }
}

TEST_F(DeviceTools, SayThatThereIsNoDevice) {
    const std::string input = make_input(), chunks = folder_ / "chunks", out = folder_ / "out.safetensors";
    expect_success(kTools + "/kvenc " + input + " -q -o " + chunks);
    for (const std::string& command :
         {"/kvenc_on_simt " + input + " -o " + out, "/kvdec_on_simt " + chunks + " -o " + out}) {
        const Ran ran = run("SIMT_DEVICES=0 " + kEmulated + command + " --device cuda");
        EXPECT_EQ(ran.code, 1);
        EXPECT_THAT(ran.said, HasSubstr("--device cuda: no GPU"));
        EXPECT_FALSE(std::filesystem::exists(out));
    }
}

TEST_F(DeviceTools, SayThatTheBuildHasNoCuda) {
    const std::string input = make_input(), chunks = folder_ / "chunks", out = folder_ / "out.safetensors";
    expect_success(kTools + "/kvenc " + input + " -q -o " + chunks);
    for (const std::string& command :
         {"/kvenc_no_cuda " + input + " -o " + out, "/kvdec_no_cuda " + chunks + " -o " + out}) {
        const Ran ran = run(kEmulated + command + " --device cuda");
        EXPECT_EQ(ran.code, 1);
        EXPECT_THAT(ran.said, HasSubstr("this build of kvcast has no CUDA"));
        EXPECT_FALSE(std::filesystem::exists(out));
    }
}

TEST_F(DeviceTools, RefuseOtherDevices) {
    for (const char* tool : {"/kvenc", "/kvdec"}) {
        const Ran ran = run(kTools + tool + " in -o out --device tpu");
        EXPECT_EQ(ran.code, 2);
        EXPECT_THAT(ran.said, HasSubstr("cpu,cuda"));
    }
}

}  // namespace
}  // namespace kvcast::tools
