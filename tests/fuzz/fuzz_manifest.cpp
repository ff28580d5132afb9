// Any document is either refused or a manifest that comes back from its own text, and no signature opens what
// it was not made for.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "streamer/manifest.h"
#include "streamer/signature.h"
#include "streamer/store.h"
#include "tests/streamer/keys.h"

using namespace kvcast;
using namespace kvcast::streamer;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    static const PublicKey trusted[] = {test::public_key(1)};
    const std::string_view document(reinterpret_cast<const char*>(data), size);
    if (open_manifest(document, trusted).ok()) std::abort();  // nothing in the corpus is signed with this key
    const Result<std::string> json = open_manifest(document, {});
    if (!json.ok()) return 0;
    const Result<Manifest> manifest = read_manifest(json.value());
    if (!manifest.ok()) return 0;
    const Result<Manifest> again = read_manifest(write_manifest(manifest.value()));
    if (!again.ok() || !(again.value() == manifest.value())) std::abort();
    (void)confirm_chain(manifest.value(), "", {});
    (void)manifest_name(manifest.value());
    return 0;
}
