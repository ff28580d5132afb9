// Text to token ids by the tokenizer of a Hugging Face directory. The tokenizer itself is the Python package
// `tokenizers`, run as a process: its file format is its own, and large.
#pragma once

#include <string>

#include "tools/model/tokens.h"

namespace kvcast::model {

// Token ids of a UTF-8 text file under folder/tokenizer.json, without special tokens added. Throws
// tools::Error, also where python3 or the package is not there.
TokenIds tokenize_file(const std::string& folder, const std::string& path);

}  // namespace kvcast::model
