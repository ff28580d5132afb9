# kvcast::device, encoding and decoding from host memory (codec/device/coder.h), which is always there and says where a
# device is missing; and kvcast::cuda, the device API and its kernels, where nvcc is. Sets KVCAST_HAVE_CUDA. Whether or
# not they are built, the same sources are compiled and tested on the SIMT emulator (tests/simt).
set(KVCAST_HAVE_CUDA OFF)
if(NOT KVCAST_CUDA STREQUAL "OFF" AND NOT KVCAST_SANITIZE AND NOT KVCAST_FUZZ)
    include(CheckLanguage)
    check_language(CUDA)
    find_package(CUDAToolkit 12.8 QUIET)  # the first with sm_100
    if(CMAKE_CUDA_COMPILER AND TARGET CUDA::cudart_static)
        set(KVCAST_HAVE_CUDA ON)
    elseif(KVCAST_CUDA STREQUAL "ON")
        message(FATAL_ERROR "KVCAST_CUDA is ON, but there is no CUDA toolkit from 12.8 on")
    endif()
endif()
if(NOT KVCAST_HAVE_CUDA)
    message(STATUS "CUDA: kvcast::cuda is not built (no toolkit from 12.8 on, KVCAST_CUDA=OFF, or a sanitizer build)")
    add_library(kvcast_device STATIC codec/device/no_coder.cpp)
    target_link_libraries(kvcast_device PUBLIC kvcast::codec PRIVATE kvcast_flags)
    add_library(kvcast::device ALIAS kvcast_device)
    return()
endif()

if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 80-real 90-real 100)
endif()
enable_language(CUDA)
if(NOT DEFINED CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake 3.25 does not know that nvcc takes it
    set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
    set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
endif()
message(STATUS "CUDA: kvcast::cuda for ${CMAKE_CUDA_ARCHITECTURES}")

# Contraction is off for the same reason as on the host: encoders must agree.
add_library(kvcast_cuda STATIC
    kernels/cuda/analyse.cu
    kernels/cuda/decode.cu
    kernels/cuda/direct.cu
    kernels/cuda/encode.cu
    kernels/cuda/chain.cu
    kernels/cuda/klt_decode.cu
    kernels/cuda/klt_quantise.cu
    kernels/cuda/klt_write.cu
    kernels/cuda/prepare.cu
    kernels/cuda/project.cu
    kernels/cuda/store.cu
    codec/device/analysis_image.cpp
    codec/device/calibration_image.cpp
    codec/device/chain_layout.cpp
    codec/device/coder_tables.cpp
    codec/device/decode_batch.cu
    codec/device/decode_plan.cpp
    codec/device/encode_batch.cu
    codec/device/encode_plan.cpp
    codec/device/klt_encode_plan.cpp
    codec/device/plan_builder.cpp
    codec/device/plane.cpp
    codec/device/unit_task.cpp)
add_library(kvcast::cuda ALIAS kvcast_cuda)
target_compile_options(kvcast_cuda PRIVATE
    "$<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr;-fmad=false;-Werror=all-warnings;-Xcompiler=-Wall,-Wextra,-Werror>"
    "$<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Wpedantic;-Wshadow;-Wconversion;-Wno-sign-conversion;-Werror;-ffp-contract=off>")
target_link_libraries(kvcast_cuda PUBLIC kvcast::codec CUDA::cudart_static PRIVATE fmt::fmt)
target_include_directories(kvcast_cuda PUBLIC ${PROJECT_SOURCE_DIR})

add_library(kvcast_device STATIC codec/device/decoder.cpp codec/device/encoder.cpp codec/device/memory.cpp)
add_library(kvcast::device ALIAS kvcast_device)
target_link_libraries(kvcast_device PUBLIC kvcast::cuda PRIVATE kvcast_flags fmt::fmt)
