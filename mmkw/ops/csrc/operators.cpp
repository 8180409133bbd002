// Registers the operators with PyTorch. mmkw/ops/compiled.py registers shapes without values,
// gradients and counts of operations.

#include "operators.h"

#include "blocks.h"
#include "sbgemm.h"

#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <Python.h>

TORCH_LIBRARY(mmkw, library) {
  library.def("mix_cells(Tensor attention, Tensor cells, int[] grid) -> Tensor");
  library.def(
      "mix_cells_into(Tensor attention, Tensor cells, int[] grid, Tensor(a!) kernels, "
      "Tensor? panels=None) -> ()");
  library.def(
      "mix_backward(Tensor[] grad_kernels, Tensor attention, Tensor cells, int[] grid, "
      "Tensor(a!)? kernels, Tensor(b!)? rows, Tensor? panels=None) -> Tensor");
  library.def("pack_cells(Tensor cells, Tensor(a!) panels) -> ()");
  library.def("bmm(Tensor a, Tensor b, bool? by_tiles=None) -> Tensor");
  library.def(
      "is_convolution_faster(str what, int batch, int channels_out, int channels_in, int pixels, "
      "bool channels_last, float? saved=None) -> bool",
      &mmkw::is_convolution_faster);
  library.def("add_to_cells(Tensor weights, Tensor rows, Tensor(a!) sum, bool begin) -> ()");
  library.def("average(Tensor seen, bool is_tokens) -> Tensor");
  library.def(
      "attend(Tensor pooled, Tensor fc1_weight, Tensor? fc1_bias, Tensor? mean, Tensor? variance, "
      "Tensor norm_weight, Tensor norm_bias, Tensor fc2_weight, Tensor fc2_bias, int mixtures, "
      "float norm_eps, float eps) -> Tensor");
  library.def(
      "attend_to_learn(Tensor pooled, Tensor fc1_weight, Tensor? fc1_bias, Tensor norm_weight, "
      "Tensor norm_bias, Tensor fc2_weight, Tensor fc2_bias, Tensor assigned, str norm, "
      "float norm_eps, float momentum, Tensor(a!)? mean, Tensor(b!)? variance, Tensor(c!)? batches, "
      "float temperature, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "attend_backward(Tensor grad, Tensor pooled, Tensor fc1_weight, Tensor norm_weight, "
      "Tensor fc2_weight, str norm, float temperature, float eps, Tensor hidden, Tensor normed, "
      "Tensor inverses, Tensor z) -> Tensor[]");
  library.def(
      "apply_kernels(Tensor x, Tensor kernels, Tensor? bias, int[] stride, int[] padding, "
      "int[] dilation, int groups, str? way=None) -> Tensor");
  library.def(
      "backward_kernels(Tensor grad, Tensor x, int[] kernel, int[] stride, int[] padding, "
      "int[] dilation, int groups, str? way=None) -> Tensor[]");
  library.def(
      "backward_images(Tensor grad, Tensor x, Tensor kernels, int[] stride, int[] padding, "
      "int[] dilation, int groups, Tensor? added=None, str? way=None) -> Tensor");
  library.def(
      "apply_to_image(Tensor x, Tensor seen, Tensor fc1_weight, Tensor? fc1_bias, Tensor? mean, "
      "Tensor? variance, Tensor norm_weight, Tensor norm_bias, Tensor fc2_weight, Tensor fc2_bias, "
      "int mixtures, float norm_eps, float eps, Tensor cells, int[] grid, Tensor? bias, "
      "int[] stride, int[] padding, int[] dilation, int groups) -> Tensor");
}

TORCH_LIBRARY_IMPL(mmkw, CPU, library) {
  library.impl("pack_cells", &mmkw::pack_cells);
  library.impl("mix_cells", &mmkw::mix_cells);
  library.impl("mix_cells_into", &mmkw::mix_cells_into);
  library.impl("mix_backward", &mmkw::mix_backward);
  library.impl("bmm", &mmkw::bmm);
  library.impl("add_to_cells", &mmkw::add_to_cells);
  library.impl("average", &mmkw::average);
  library.impl("attend", &mmkw::attend);
  library.impl("attend_to_learn", &mmkw::attend_to_learn);
  library.impl("attend_backward", &mmkw::attend_backward);
  library.impl("apply_kernels", &mmkw::apply_kernels);
  library.impl("backward_kernels", &mmkw::backward_kernels);
  library.impl("backward_images", &mmkw::backward_images);
  library.impl("apply_to_image", &mmkw::apply_to_image);
}

// These operators have no gradient: a backward pass through them is an error, not a wrong gradient.
// mmkw/ops/compiled.py registers the gradient of mix_cells.
TORCH_LIBRARY_IMPL(mmkw, Autograd, library) {
  for (const char* name :
       {"pack_cells", "mix_cells_into", "mix_backward", "add_to_cells", "bmm", "average",
        "attend", "attend_to_learn", "attend_backward", "apply_kernels", "backward_kernels",
        "backward_images", "apply_to_image"})
    library.impl(name, torch::autograd::autogradNotImplementedFallback());
}

// Python imports this module to load the library.
PyMODINIT_FUNC PyInit__native() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, nullptr};
  PyObject* const made = PyModule_Create(&module);
  if (made) {
    PyModule_AddStringConstant(made, "CPU_LEVEL", mmkw::blocks().cpu_level);
    PyModule_AddIntConstant(made, "MULTIPLIES_BFLOAT16", mmkw::sbgemm::is_available());
    PyModule_AddStringConstant(made, "TORCH", MMKW_TORCH);
  }
  return made;
}
