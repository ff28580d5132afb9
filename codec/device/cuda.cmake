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
set(device_headers codec/device/coder.h codec/device/plane.h kernels/cuda/tasks.h)
if(NOT KVCAST_HAVE_CUDA)
    message(STATUS "CUDA: kvcast::cuda is not built (no toolkit from 12.8 on, KVCAST_CUDA=OFF, or a sanitizer build)")
    kvcast_library(device
        SOURCES codec/device/no_coder.cpp
        HEADERS ${device_headers}
        PUBLIC kvcast::codec
        PRIVATE $<BUILD_INTERFACE:kvcast_flags>)
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

kvcast_library(cuda
    SOURCES
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
        codec/device/unit_task.cpp
    HEADERS
        codec/device.h
        codec/device/analysis_image.h
        codec/device/calibration_image.h
        codec/device/decode_plan.h
        codec/device/encode_plan.h
        codec/device/image.h
        codec/device/matrix_image.h
        kernels/cuda/encode_step.h
        kernels/cuda/encode_tasks.h
        kernels/cuda/limbs.h
        kernels/cuda/strip_list.h
    PUBLIC kvcast::codec CUDA::cudart_static
    PRIVATE fmt::fmt)
# Contraction is off for the same reason as on the host: encoders must agree.
target_compile_options(kvcast_cuda PRIVATE
    "$<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr;-fmad=false;-Xcompiler=-Wall,-Wextra>"
    "$<$<AND:$<COMPILE_LANGUAGE:CUDA>,$<BOOL:${CMAKE_COMPILE_WARNING_AS_ERROR}>>:-Xcompiler=-Werror>"
    "$<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Wpedantic;-Wshadow;-Wconversion;-Wno-sign-conversion;-ffp-contract=off>")

kvcast_library(device
    SOURCES codec/device/decoder.cpp codec/device/encoder.cpp codec/device/memory.cpp
    HEADERS ${device_headers}
    PUBLIC kvcast::cuda
    PRIVATE $<BUILD_INTERFACE:kvcast_flags> fmt::fmt)
