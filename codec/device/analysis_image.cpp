#include "codec/device/analysis_image.h"

namespace kvcast::device {

Result<AnalysisImage> AnalysisImage::make(std::shared_ptr<const Calibration> calibration) {
    auto analysis = KltAnalysis::make(std::move(calibration));
    if (!analysis.ok()) return analysis.status();
    AnalysisImage image;
    image.analysis_ = std::move(analysis.value());
    const CalibrationData& data = image.analysis_->calibration().data();
    for (std::size_t unit = 0; unit < data.units.size(); ++unit)
        image.matrices_.push_back(append_matrix(image.bytes_, image.analysis_->matrix(unit)));
    return image;
}

}  // namespace kvcast::device
