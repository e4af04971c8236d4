# Included by CMake right after llama.cpp's project() call. llama-cpp-python forces llama.cpp's "common" library
# on, a third of the compile time, which nothing in martlet or in the Python package uses.
set(LLAMA_BUILD_COMMON OFF)
