#include "tools/common/layer_steps.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "tools/common/file.h"
#include "tools/common/kv_file.h"

namespace kvcast::tools {

LayerSteps read_layer_steps(const std::string& path, const Layout& layout) {
    const MappedFile file(path);
    const auto* text = reinterpret_cast<const char*>(file.bytes().data());
    const auto json = nlohmann::json::parse(text, text + file.bytes().size(), nullptr, false);
    LayerSteps steps;
    for (std::size_t l = 0; l < layout.layers; ++l) {
        for (const std::string& plane : plane_names(layout)) {
            const bool there = json.is_object() && json.contains(plane) && json[plane].is_array() &&
                               json[plane].size() == layout.layers && json[plane][l].is_number();
            if (!there)
                throw Error(fmt::format("{}: expected a JSON object with an array \"{}\" of {} numbers", path,
                                        plane, layout.layers));
            steps.push_back(json[plane][l].get<double>());
        }
    }
    if (Status s = check_layer_steps(steps, layout); !s.ok())
        throw Error(fmt::format("{}: {}", path, s.message()));
    return steps;
}

std::string layer_steps_file(const std::string& choice) {
    return choice == "flat" || choice == "thirds" ? "" : choice;
}

LayerSteps choose_layer_steps(const std::string& choice, const Layout& layout) {
    if (choice == "flat") return {};
    if (choice == "thirds") return thirds(layout.layers, layout.planes.size());
    return read_layer_steps(choice, layout);
}

void write_layer_steps(const std::string& path, const Layout& layout, const LayerSteps& steps) {
    const std::vector<std::string> planes = plane_names(layout);
    std::string text = "{";
    for (std::size_t p = 0; p < planes.size(); ++p) {
        text += fmt::format("{}\n  \"{}\": [", p == 0 ? "" : ",", planes[p]);
        for (std::size_t l = 0; l < layout.layers; ++l)
            text += fmt::format("{}{:.4g}", l == 0 ? "" : ", ", steps[l * planes.size() + p]);
        text += "]";
    }
    text += "\n}\n";
    write_text(path, text);
}

}  // namespace kvcast::tools
