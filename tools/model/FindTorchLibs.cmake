# libtorch as one imported target, TorchLibs::TorchLibs: the headers (as system headers) and the two libraries that
# the model runner uses, torch_cpu and c10.
#
# Found in this order:
#   KVCAST_TORCH_DIR   a libtorch folder: an unpacked download, or .../site-packages/torch of a pip install
#   the system         Debian's libtorch-dev
#
# TorchConfig.cmake is not used: it also asks for CUDA, protobuf and MKL where libtorch was built with them, which
# linking against it does not need. For the same reason symbols that torch_cpu itself leaves to other libraries may
# stay undefined at link time; the loader finds them by torch_cpu's own search path. CUDA is opened at run time.
set(KVCAST_TORCH_DIR "" CACHE PATH "libtorch folder (include/, lib/); empty: the system's libtorch-dev")

set(_torch_search "")
if(KVCAST_TORCH_DIR)
    set(_torch_search HINTS ${KVCAST_TORCH_DIR} NO_DEFAULT_PATH)
    # A changed folder is searched again; find_* keeps what it has found before.
    if(NOT KVCAST_TORCH_DIR STREQUAL "${_kvcast_torch_dir_searched}")
        unset(TorchLibs_INCLUDE_DIR CACHE)
        unset(TorchLibs_CPU_LIBRARY CACHE)
        unset(TorchLibs_C10_LIBRARY CACHE)
        set(_kvcast_torch_dir_searched "${KVCAST_TORCH_DIR}" CACHE INTERNAL "")
    endif()
endif()
find_path(TorchLibs_INCLUDE_DIR torch/csrc/autograd/autograd.h PATH_SUFFIXES include ${_torch_search})
find_library(TorchLibs_CPU_LIBRARY torch_cpu PATH_SUFFIXES lib ${_torch_search})
find_library(TorchLibs_C10_LIBRARY c10 PATH_SUFFIXES lib ${_torch_search})
mark_as_advanced(TorchLibs_INCLUDE_DIR TorchLibs_CPU_LIBRARY TorchLibs_C10_LIBRARY)

# Where the version stands differs between releases.
set(TorchLibs_VERSION "")
foreach(_header torch/headeronly/version.h torch/csrc/api/include/torch/version.h)
    if(NOT TorchLibs_VERSION AND EXISTS "${TorchLibs_INCLUDE_DIR}/${_header}")
        file(STRINGS "${TorchLibs_INCLUDE_DIR}/${_header}" _lines REGEX "define TORCH_VERSION_(MAJOR|MINOR|PATCH) [0-9]+")
        string(REGEX REPLACE "[^0-9;]" "" _lines "${_lines}")
        string(REPLACE ";" "." TorchLibs_VERSION "${_lines}")
    endif()
endforeach()

# pip wheels before 2.6 were built with the old std::string: they cannot be linked with anything of this project.
set(_torch_old_abi FALSE)
if(KVCAST_TORCH_DIR AND EXISTS "${KVCAST_TORCH_DIR}/share/cmake/Torch/TorchConfig.cmake")
    file(STRINGS "${KVCAST_TORCH_DIR}/share/cmake/Torch/TorchConfig.cmake" _lines REGEX "_GLIBCXX_USE_CXX11_ABI=0")
    if(_lines)
        set(_torch_old_abi TRUE)
        set(_torch_reason REASON_FAILURE_MESSAGE "${KVCAST_TORCH_DIR} was built with _GLIBCXX_USE_CXX11_ABI=0")
    endif()
endif()
if(_torch_old_abi)
    set(TorchLibs_CPU_LIBRARY TorchLibs_CPU_LIBRARY-NOTFOUND)
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
    TorchLibs
    REQUIRED_VARS TorchLibs_CPU_LIBRARY TorchLibs_C10_LIBRARY TorchLibs_INCLUDE_DIR
    VERSION_VAR TorchLibs_VERSION ${_torch_reason})

# pip's torch carries other versions of fmt and nlohmann_json among its headers, which would hide the ones that this
# project links with; only libtorch's own folders are let in.
set(_torch_headers "${TorchLibs_INCLUDE_DIR}")
if(TorchLibs_FOUND AND KVCAST_TORCH_DIR)
    set(_torch_headers "${CMAKE_CURRENT_BINARY_DIR}/torch-headers")
    file(MAKE_DIRECTORY "${_torch_headers}")
    foreach(_folder ATen c10 torch)
        file(CREATE_LINK "${TorchLibs_INCLUDE_DIR}/${_folder}" "${_torch_headers}/${_folder}" SYMBOLIC)
    endforeach()
endif()

if(TorchLibs_FOUND AND NOT TARGET TorchLibs::TorchLibs)
    add_library(TorchLibs::TorchLibs INTERFACE IMPORTED)
    target_include_directories(TorchLibs::TorchLibs SYSTEM INTERFACE "${_torch_headers}")
    target_link_libraries(TorchLibs::TorchLibs INTERFACE "${TorchLibs_CPU_LIBRARY}" "${TorchLibs_C10_LIBRARY}")
    target_link_options(TorchLibs::TorchLibs INTERFACE -Wl,--allow-shlib-undefined)
endif()
