// Draws a picture by the file that `python -m export.single_file` writes, on OpenVINO.
//
//   picture FILE.onnx LABEL LATENT IMAGE OUT [NOISE]
//   picture mnist.onnx 7 8x8 64x64 seven.pgm
//
// Sizes are height x width. OUT is a grey .pgm or a colour .ppm, as the model has it. NOISE is a
// file of float32 numbers, C x H x W; random ones are taken where it is left out.
#include <cmath>
#include <cstdint>
#include <fstream>
#include <iostream>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include <openvino/openvino.hpp>

namespace {

struct Size {
  size_t height, width;
};

Size parse(const std::string& text) {
  const size_t cut = text.find('x');
  if (cut == std::string::npos) throw std::invalid_argument(text + ": expected HEIGHTxWIDTH");
  return {std::stoul(text.substr(0, cut)), std::stoul(text.substr(cut + 1))};
}

void fill(ov::Tensor& noise, const char* file) {
  float* numbers = noise.data<float>();
  if (file) {
    std::ifstream in(file, std::ios::binary);
    in.read(reinterpret_cast<char*>(numbers), noise.get_byte_size());
    if (!in) throw std::runtime_error(std::string(file) + ": too few numbers for the latent");
    return;
  }
  std::mt19937 engine(std::random_device{}());
  std::normal_distribution<float> normal;
  for (size_t i = 0; i < noise.get_size(); ++i) numbers[i] = normal(engine);
}

void save(const ov::Tensor& pixels, const std::string& path) {
  const ov::Shape shape = pixels.get_shape();  // [1, c, h, w] in [0, 1]
  const size_t channels = shape[1], plane = shape[2] * shape[3];
  const float* values = pixels.data<const float>();
  std::vector<uint8_t> bytes(channels * plane);
  for (size_t i = 0; i < plane; ++i)
    for (size_t c = 0; c < channels; ++c)
      bytes[i * channels + c] = static_cast<uint8_t>(std::lround(255 * values[c * plane + i]));
  std::ofstream out(path, std::ios::binary);
  out << (channels == 3 ? "P6\n" : "P5\n") << shape[3] << ' ' << shape[2] << "\n255\n";
  out.write(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  if (!out) throw std::runtime_error(path + ": cannot be written");
}

void draw(int count, char** words) {
  const std::string file = words[1], out = words[5];
  const size_t label = std::stoul(words[2]);
  const Size latent = parse(words[3]), image = parse(words[4]);

  ov::Core core;
  const auto model = core.read_model(file);
  // Without the hint a processor that has bfloat16 may compute in it.
  auto compiled = core.compile_model(model, "CPU", ov::hint::inference_precision(ov::element::f32));
  auto request = compiled.create_infer_request();

  const auto channels = model->input("noise").get_partial_shape()[1].get_length();
  ov::Tensor noise(ov::element::f32, {1, size_t(channels), latent.height, latent.width});
  fill(noise, count > 6 ? words[6] : nullptr);
  request.set_tensor("noise", noise);
  for (const auto& input : model->inputs()) {  // what pixels or no labels need is left out
    const std::string name = input.get_any_name();
    if (name == "condition") {
      const size_t labels = input.get_partial_shape()[1].get_length();
      if (label >= labels) throw std::invalid_argument("expected a label below " + std::to_string(labels));
      ov::Tensor condition(ov::element::f32, {1, labels});
      std::fill_n(condition.data<float>(), labels, 0.0f);
      condition.data<float>()[label] = 1;
      request.set_tensor(name, condition);
    } else if (name == "guidance_scale") {
      ov::Tensor scale(ov::element::f32, ov::Shape{});
      scale.data<float>()[0] = 2;
      request.set_tensor(name, scale);
    } else if (name == "size") {
      ov::Tensor size(ov::element::i64, {2});
      size.data<int64_t>()[0] = image.height;
      size.data<int64_t>()[1] = image.width;
      request.set_tensor(name, size);
    }
  }
  request.infer();
  save(request.get_tensor("pixels"), out);
}

}  // namespace

int main(int count, char** words) {
  if (count < 6 || count > 7) {
    std::cerr << "usage: picture FILE.onnx LABEL LATENT IMAGE OUT [NOISE]\n";
    return 2;
  }
  try {
    draw(count, words);
  } catch (const std::exception& error) {
    std::cerr << "picture: " << error.what() << '\n';
    return 1;
  }
}
