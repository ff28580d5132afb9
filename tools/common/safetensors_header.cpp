#include "tools/common/safetensors_header.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <new>
#include <nlohmann/json.hpp>
#include <utility>

#include "tools/common/file.h"

namespace kvcast::tools {
namespace {

using Json = nlohmann::json;

constexpr std::size_t kShownNameBytes = 80;

[[noreturn]] void fail(const std::string& file, const std::string& what) {
    throw DamagedInput(fmt::format("{}: {}", file, what));
}

std::string not_json_at(std::size_t position) {
    return fmt::format("the header is not valid JSON at its byte {}", position);
}

// Takes the header's JSON event by event. No document is built: one would silently merge repeated names, and
// its depth would be the file's to choose. A handler returns false, with the error set, to stop the parser.
class HeaderParser final : public nlohmann::json_sax<Json> {
  public:
    const std::string& error() const { return error_; }
    SafetensorsHeader& header() { return header_; }

    bool null() override { return unexpected("null"); }
    bool boolean(bool /*value*/) override { return unexpected("a boolean"); }
    bool number_integer(number_integer_t /*value*/) override { return unexpected("a negative number"); }
    bool number_float(number_float_t /*value*/, const string_t& text) override {
        return unexpected(in_quotes(text));
    }
    bool binary(binary_t& /*value*/) override { return unexpected("binary data"); }
    bool number_unsigned(number_unsigned_t value) override;
    bool string(string_t& value) override;
    bool start_object(std::size_t size) override;
    bool key(string_t& name) override;
    bool end_object() override;
    bool start_array(std::size_t size) override;
    bool end_array() override;
    bool parse_error(std::size_t position, const std::string& token,
                     const nlohmann::detail::exception& e) override;

  private:
    // What comes next; in the order of kExpected.
    enum class Next : std::uint8_t {
        kHeader,
        kTensorName,
        kTensor,
        kField,
        kType,
        kShape,
        kDimension,
        kOffsets,
        kOffset,
        kMetadata,
        kMetadataName,
        kMetadataValue,
        kEnd
    };
    static constexpr std::array<std::string_view, 13> kExpected = {"an object of tensors",
                                                                   "a tensor's name",
                                                                   "an object",
                                                                   "a field's name",
                                                                   "a string as dtype",
                                                                   "an array as shape",
                                                                   "an unsigned integer in shape",
                                                                   "an array as data_offsets",
                                                                   "an unsigned integer in data_offsets",
                                                                   "an object",
                                                                   "a name",
                                                                   "a string as value",
                                                                   "the end"};

    bool stop(const std::string& error);
    bool unexpected(std::string_view found);
    bool take(std::vector<std::size_t>& list, std::size_t value, std::size_t limit);
    bool tensor_name(string_t& name);
    bool field_name(const std::string& name);
    bool metadata_name(const std::string& name);
    bool repeated(const std::string& name) { return stop(fmt::format("{} appears twice", in_quotes(name))); }
    template <typename T>
    bool begin_field(std::optional<T>& field, Next next, const std::string& name);

    SafetensorsHeader header_;
    Next next_ = Next::kHeader;
    std::string place_ = "the header";
    bool had_metadata_ = false;
    std::string* metadata_value_ = nullptr;
    std::string error_;
};

bool HeaderParser::stop(const std::string& error) {
    error_ = fmt::format("{}: {}", place_, error);
    return false;
}

bool HeaderParser::unexpected(std::string_view found) {
    return stop(fmt::format("expected {}, found {}", kExpected[static_cast<std::size_t>(next_)], found));
}

bool HeaderParser::take(std::vector<std::size_t>& list, std::size_t value, std::size_t limit) {
    if (list.size() == limit) return stop(fmt::format("expected at most {} numbers in an array", limit));
    list.push_back(value);
    return true;
}

bool HeaderParser::number_unsigned(number_unsigned_t value) {
    if (next_ == Next::kDimension) return take(*header_.tensors.back().shape, value, kMaxDimensions);
    if (next_ == Next::kOffset) return take(*header_.tensors.back().offsets, value, 2);
    return unexpected("a number");
}

bool HeaderParser::string(string_t& value) {
    if (next_ == Next::kType) {
        *header_.tensors.back().type = std::move(value);
        next_ = Next::kField;
        return true;
    }
    if (next_ != Next::kMetadataValue) return unexpected("a string");
    *metadata_value_ = std::move(value);
    next_ = Next::kMetadataName;
    return true;
}

bool HeaderParser::start_object(std::size_t /*size*/) {
    if (next_ == Next::kHeader) {
        next_ = Next::kTensorName;
    } else if (next_ == Next::kTensor) {
        next_ = Next::kField;
    } else if (next_ == Next::kMetadata) {
        next_ = Next::kMetadataName;
    } else {
        return unexpected("an object");
    }
    return true;
}

bool HeaderParser::end_object() {
    next_ = next_ == Next::kTensorName ? Next::kEnd : Next::kTensorName;
    place_ = "the header";
    return true;
}

bool HeaderParser::start_array(std::size_t /*size*/) {
    if (next_ == Next::kShape) {
        next_ = Next::kDimension;
    } else if (next_ == Next::kOffsets) {
        next_ = Next::kOffset;
    } else {
        return unexpected("an array");
    }
    return true;
}

bool HeaderParser::end_array() {
    next_ = Next::kField;
    return true;
}

bool HeaderParser::key(string_t& name) {
    if (next_ == Next::kTensorName) return tensor_name(name);
    if (next_ == Next::kField) return field_name(name);
    return metadata_name(name);
}

// Repeated tensor names are found once all are known, by sorting.
bool HeaderParser::tensor_name(string_t& name) {
    if (name == kMetadataKey) {
        if (std::exchange(had_metadata_, true)) return repeated(name);
        place_ = kMetadataKey;
        next_ = Next::kMetadata;
        return true;
    }
    place_ = fmt::format("tensor {}", in_quotes(name));
    next_ = Next::kTensor;
    header_.tensors.emplace_back().name = std::move(name);
    return true;
}

template <typename T>
bool HeaderParser::begin_field(std::optional<T>& field, Next next, const std::string& name) {
    if (field) return repeated(name);
    field.emplace();
    next_ = next;
    return true;
}

bool HeaderParser::field_name(const std::string& name) {
    TensorEntry& tensor = header_.tensors.back();
    if (name == "dtype") return begin_field(tensor.type, Next::kType, name);
    if (name == "shape") return begin_field(tensor.shape, Next::kShape, name);
    if (name == "data_offsets") return begin_field(tensor.offsets, Next::kOffsets, name);
    return stop(fmt::format("expected dtype, shape and data_offsets, found {}", in_quotes(name)));
}

bool HeaderParser::metadata_name(const std::string& name) {
    const auto [entry, inserted] = header_.metadata.try_emplace(name);
    if (!inserted) return repeated(name);
    metadata_value_ = &entry->second;
    next_ = Next::kMetadataValue;
    return true;
}

bool HeaderParser::parse_error(std::size_t position, const std::string& /*token*/,
                               const nlohmann::detail::exception& /*e*/) {
    error_ = not_json_at(position);
    return false;
}

}  // namespace

SafetensorsHeader parse_safetensors_header(std::string_view json, const std::string& file) {
    if (json.empty() || json.front() != '{')
        fail(file, "expected a safetensors header, which begins with '{'");
    // The JSON parser would take a zero byte for the end of its input.
    if (const std::size_t zero = json.find('\0'); zero != std::string_view::npos) {
        fail(file, not_json_at(zero + 1));
    }
    HeaderParser parser;
    try {
        if (Json::sax_parse(json.begin(), json.end(), &parser)) return std::move(parser.header());
    } catch (const std::bad_alloc&) {
        throw Error(fmt::format("{}: no memory for a header of {} bytes", file, json.size()));
    }
    fail(file, parser.error());
}

std::string in_quotes(std::string_view text) {
    std::size_t shown = std::min(text.size(), kShownNameBytes);
    if (shown < text.size()) {
        while (shown > 0 && (static_cast<unsigned char>(text[shown]) & 0xC0) == 0x80) --shown;
    }
    std::string out = "'";
    for (const char c : text.substr(0, shown)) {
        const auto byte = static_cast<unsigned char>(c);
        if (byte < 0x20 || byte == 0x7F) {
            out += fmt::format("\\x{:02x}", byte);
        } else {
            out += c;
        }
    }
    return out + (shown < text.size() ? "...'" : "'");
}

}  // namespace kvcast::tools
