// The compiled kernels of dot and combine_: in float32, in float64, each by the size of its arguments.
#pragma once

#include "combine.h"
#include "dot.h"
#include "kernel_tables.h"

namespace fastsam::FASTSAM_ISA {

template <class Header>
constexpr int kSmallTable = (kSmallBytes - static_cast<int>(sizeof(Header))) / 8;
template <class Header>
constexpr int kLargeTable =
    kLargeWords == kSmallWords ? kSmallTable<Header> : (kLargeBytes - static_cast<int>(sizeof(Header))) / 8;

template <class Header>
struct OperandVariants {
  void (*small)(const OperandArguments<Header, kSmallTable<Header>>);
  void (*large)(const OperandArguments<Header, kLargeTable<Header>>);
};
using DotVariants = OperandVariants<DotHeader>;
using CombineVariants = OperandVariants<CombineHeader>;
extern const DotVariants dot_kernels[];
extern const CombineVariants combine_kernels[];

// clang-format off
#define FASTSAM_OPERANDS(kernel, header) \
  {{kernel<kSmallTable<header>, float>, kernel<kLargeTable<header>, float>}, \
   {kernel<kSmallTable<header>, double>, kernel<kLargeTable<header>, double>}}
// clang-format on

// Blocks that a processor holds at least, as in kernel_tables.h.
template <class T>
constexpr int kDotBlocks = sizeof(T) == 8 ? 2 : 3;
template <class T>
constexpr int kCombineBlocks = sizeof(T) == 8 ? 4 : 5;

}  // namespace fastsam::FASTSAM_ISA
