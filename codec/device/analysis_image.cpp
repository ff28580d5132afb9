#include "codec/device/analysis_image.h"

#include "codec/device/image.h"

namespace kvcast::device {

Result<AnalysisImage> AnalysisImage::make(std::shared_ptr<const Calibration> calibration) {
    auto analysis = KltAnalysis::make(std::move(calibration));
    if (!analysis.ok()) return analysis.status();
    AnalysisImage image;
    image.analysis_ = std::move(analysis.value());
    const CalibrationData& data = image.analysis_->calibration().data();
    for (std::size_t unit = 0; unit < data.units.size(); ++unit) {
        const ShiftedMatrix& transform = data.units[unit].transform;
        image.offsets_.push_back(append<float>(
            image.bytes_, {image.analysis_->matrix(unit), transform.outputs * transform.inputs}));
    }
    return image;
}

}  // namespace kvcast::device
