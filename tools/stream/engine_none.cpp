#include "tools/common/file.h"
#include "tools/stream/engine.h"

namespace kvcast::tools {

void prepare_for_engine(char**) {}

std::unique_ptr<Engine> load_engine(const std::string& folder, int) {
    throw Error(folder + ": this build has no libtorch to run a model with");
}

}  // namespace kvcast::tools
