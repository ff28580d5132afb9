#include "codec/device/analysis_image.h"

#include "codec/device/image.h"

namespace kvcast::device {

Result<AnalysisImage> AnalysisImage::make(std::shared_ptr<const Calibration> calibration) {
    auto analysis = KltAnalysis::make(std::move(calibration));
    if (!analysis.ok()) return analysis.status();
    AnalysisImage image;
    image.analysis_ = std::move(analysis.value());
    const CalibrationData& data = image.analysis_->calibration().data();
    for (const std::size_t parts : data.parts) {
        image.first_.push_back(image.per_layer_);
        image.per_layer_ += parts;
    }
    for (std::size_t layer = 0; layer < data.layout.layers; ++layer) {
        for (std::size_t plane = 0; plane < data.parts.size(); ++plane) {
            const std::size_t width = data.part_width(plane);
            for (std::size_t part = 0; part < data.parts[plane]; ++part) {
                const float* matrix = image.analysis_->matrix(layer, plane, part);
                image.offsets_.push_back(append<float>(image.bytes_, {matrix, width * width}));
            }
        }
    }
    return image;
}

std::size_t AnalysisImage::matrix(std::size_t layer, std::size_t plane, std::size_t part) const {
    return offsets_[layer * per_layer_ + first_[plane] + part];
}

}  // namespace kvcast::device
