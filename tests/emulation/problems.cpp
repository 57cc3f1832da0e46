// Runs the kernels of one operator on a random problem. In the emulation every buffer is watched, and what the checker
// found is printed; compiled by nvcc, the same problems run on a GPU.
//   problems_trace admixture rows=64 columns=128 vectors=2048 length=256 k=2 type=f32 candidates=i16 out=bf16 seed=1
//   problems @FILE    for many of them, a line each
#include <algorithm>
#include <fstream>
#include <iostream>
#include <map>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "numeric.h"

#ifdef __CUDACC__
#include "gpu.h"
#else
#include "host.h"
#endif

namespace {

using namespace vblora;
using vblora_emulation::allocate_buffer;
using vblora_emulation::trace::Contents;

struct Options {
  std::map<std::string, std::string> given;

  int64_t number(const char* name, int64_t otherwise) const {
    const auto at = given.find(name);
    return at == given.end() ? otherwise : std::stoll(at->second);
  }
  Type type(const char* name, Type otherwise) const {
    static const std::map<std::string, Type> types = {{"f32", Type::f32}, {"f64", Type::f64}, {"bf16", Type::bf16},
                                                      {"f16", Type::f16}, {"u8", Type::u8},   {"i16", Type::i16},
                                                      {"i32", Type::i32}, {"i64", Type::i64}};
    return has(name) ? types.at(given.at(name)) : otherwise;
  }
  bool has(const char* name) const { return given.count(name) && given.at(name) != "none"; }
};

size_t bytes_of(Type type) {
  switch (type) {
    case Type::u8: return 1;
    case Type::bf16:
    case Type::f16:
    case Type::i16: return 2;
    case Type::f32:
    case Type::i32: return 4;
    default: return 8;
  }
}

void set(void* array, Type type, int64_t i, double value) {
  switch (type) {
    case Type::f32: static_cast<float*>(array)[i] = static_cast<float>(value); break;
    case Type::f64: static_cast<double*>(array)[i] = value; break;
    case Type::bf16: store(static_cast<bf16*>(array) + i, static_cast<float>(value)); break;
    case Type::f16: store(static_cast<f16*>(array) + i, static_cast<float>(value)); break;
    case Type::u8: static_cast<uint8_t*>(array)[i] = static_cast<uint8_t>(value); break;
    case Type::i16: static_cast<int16_t*>(array)[i] = static_cast<int16_t>(value); break;
    case Type::i32: static_cast<int32_t*>(array)[i] = static_cast<int32_t>(value); break;
    case Type::i64: static_cast<int64_t*>(array)[i] = static_cast<int64_t>(value); break;
  }
}

struct Problems {
  Options options;
  std::mt19937_64 random{static_cast<uint64_t>(options.number("seed", 0))};
  int64_t rows = options.number("rows", 64), columns = options.number("columns", 128),
          vectors = options.number("vectors", options.has("candidates") ? 2048 : columns),
          length = options.number("length", 256), k = options.number("k", 2);
  Type type = options.type("type", Type::f32), out_type = options.type("out", type),
       candidate_type = options.type("candidates", Type::i32), weight_type = type == Type::f64 ? Type::f64 : Type::f32;

  // shifted=NAME: that buffer begins an element past where an allocation does, as a tensor's view may.
  void* buffer(const char* name, Type of, int64_t count, Contents contents) {
    const bool shifted = options.has("shifted") && options.given.at("shifted") == name;
    return allocate_buffer(name, static_cast<size_t>(count) * bytes_of(of), contents, shifted ? bytes_of(of) : 0);
  }
  void* output(const char* name, Type of, int64_t count) { return buffer(name, of, count, Contents::output); }
  template <class Draw>
  void* input(const char* name, Type of, int64_t count, Draw&& draw) {
    std::vector<char> drawn(static_cast<size_t>(count) * bytes_of(of));
    for (int64_t i = 0; i < count; ++i) set(drawn.data(), of, i, draw());
    void* array = buffer(name, of, count, Contents::input);
    vblora_emulation::upload(array, drawn.data(), drawn.size());
    return array;
  }
  void* numbers(const char* name, Type of, int64_t count) {
    return input(name, of, count, [&] { return std::normal_distribution<double>()(random); });
  }
  // Without repetition within a row, as top-k gives them and the layer's candidates are. popular=N: but for the first
  // of each row, which is one of the N first, or, if that is negative, of the -N last.
  void* choices(const char* name, Type of, int64_t count, int64_t a_row, int64_t out_of) {
    std::vector<int64_t> all(static_cast<size_t>(out_of));
    std::iota(all.begin(), all.end(), 0);
    const int64_t popular = options.number("popular", 0);
    int64_t i = 0;
    return input(name, of, count, [&] {
      const int64_t place = i++ % a_row % out_of;
      if (popular && place == 0) {
        const int64_t chosen = static_cast<int64_t>(random() % static_cast<uint64_t>(std::abs(popular)));
        return static_cast<double>(popular > 0 ? chosen : out_of - 1 - chosen);
      }
      std::swap(all[place], all[std::uniform_int_distribution<int64_t>(place, out_of - 1)(random)]);
      return static_cast<double>(all[place]);
    });
  }
  void* candidates() {
    return options.has("candidates") ? choices("candidates", candidate_type, rows * columns, columns, vectors)
                                     : nullptr;
  }

  // runs=N: of N rows each, but every third of these has no gradient, and is left out.
  std::vector<GradRun> grad_runs(Type of) {
    const int64_t a_run = options.number("runs", rows);
    std::vector<GradRun> runs;
    for (int64_t begin = 0; begin < rows; begin += a_run) {
      const int64_t count = std::min(a_run, rows - begin);
      if (begin / a_run % 3 != 2) runs.push_back({numbers("grad_subvectors", of, count * length), begin, count});
    }
    return runs;
  }
  // Nothing is written where the flag stays.
  bool* flags() {
    std::vector<char> none(static_cast<size_t>(rows));
    void* array = output("exhausted", Type::u8, rows);
    vblora_emulation::upload(array, none.data(), none.size());
    return static_cast<bool*>(array);
  }

  template <class Launch>
  void run(const Launch& launch) {
    vblora_emulation::run(launch, options.number("repeat", 0));
  }

  void admixture() {
    const Admixture problem = {.type = type,
                               .candidate_type = candidate_type,
                               .out_type = out_type,
                               .logits = numbers("logits", type, rows * columns),
                               .bank = numbers("bank", type, vectors * length),
                               .candidates = candidates(),
                               .subvectors = output("subvectors", out_type, rows * length),
                               .indices = static_cast<int32_t*>(output("indices", Type::i32, rows * k)),
                               .weights = output("weights", weight_type, rows * k),
                               .exhausted = options.number("exhausted", 0) ? flags() : nullptr,
                               .rows = rows,
                               .columns = columns,
                               .vectors = vectors,
                               .length = length,
                               .k = k};
    run([&] { vblora_emulation::admixture(problem); });
  }
  void compose() {
    const Type index_type = options.type("indices", Type::i32);
    const Composition problem = {.type = type,
                                 .index_type = index_type,
                                 .out_type = out_type,
                                 .bank = numbers("bank", type, vectors * length),
                                 .indices = choices("indices", index_type, rows * k, k, vectors),
                                 .weights = numbers("weights", weight_type, rows * k),
                                 .subvectors = output("subvectors", out_type, rows * length),
                                 .rows = rows,
                                 .vectors = vectors,
                                 .length = length,
                                 .k = k};
    run([&] { vblora_emulation::compose(problem); });
  }
  // adapters: how many there are; every third row has none, and one an index that is out of range. one=1: one for all.
  void add_updates() {
    const int64_t positions = options.number("positions", 1), in = options.number("inputs", 64),
                  out = options.number("outputs", 64), rank = options.number("rank", 4);
    const bool one = options.number("one", 0);
    const int64_t count = one ? 1 : options.number("adapters", 3);
    std::vector<double> before(static_cast<size_t>(rows * positions * out));
    void* y = output("y", type, rows * positions * out);
    for (size_t i = 0; i < before.size(); ++i) set(before.data(), type, static_cast<int64_t>(i), 0.5);
    vblora_emulation::upload(y, before.data(), before.size() * bytes_of(type));
    vblora_emulation::trace::host_write(y, before.size() * bytes_of(type));
    int64_t row = 0;
    const Update problem = {
        .type = type,
        .y = y,
        .x = numbers("x", type, rows * positions * in),
        .A = numbers("A", type, count * rank * in),
        .B = numbers("B", type, count * rank * out),
        .adapters = one ? nullptr
                        : static_cast<const int64_t*>(
                              input("adapters", Type::i64, rows,
                                    [&] {
                                      ++row;
                                      return static_cast<double>(row % 3 == 0 ? -1 : row == 4 ? count : row % count);
                                    })),
        .rows = rows,
        .positions = positions,
        .in = in,
        .out = out,
        .rank = rank,
        .count = count,
        .A_stride = rank * in,
        .B_stride = rank * out};
    run([&] { vblora_emulation::add_updates(problem); });
  }
  void draw() {
    const Draw problem = {
        .type = type,
        .candidate_type = candidate_type,
        .logits = output("logits", type, rows * columns),
        .candidates = options.has("candidates") ? output("candidates", candidate_type, rows * columns) : nullptr,
        .rows = rows,
        .columns = columns,
        .vectors = vectors,
        .seed = static_cast<uint64_t>(options.number("seed", 0)),
        .std = 0.02};
    run([&] { vblora_emulation::draw(problem); });
  }
  void draw_uniform() {
    const UniformDraw problem = {.type = type,
                                 .values = output("values", type, rows * columns),
                                 .rows = rows,
                                 .columns = columns,
                                 .seed = static_cast<uint64_t>(options.number("seed", 0)),
                                 .stream = 1,
                                 .bound = 0.1};
    run([&] { vblora_emulation::draw_uniform(problem); });
  }
  void admixture_backward(bool atomic) {
    const Type grad_type = options.type("out", type);
    const bool need_logits = options.number("need_logits", 1), need_bank = options.number("need_bank", 1);
    const std::vector<GradRun> runs =
        options.number("grad_subvectors", 1) ? grad_runs(grad_type) : std::vector<GradRun>();
    AdmixtureBackward problem = {
        .type = type,
        .candidate_type = candidate_type,
        .grad_type = grad_type,
        .grad_runs = runs.data(),
        .num_grad_runs = static_cast<int64_t>(runs.size()),
        .grad_weights = options.number("grad_weights", 0) ? numbers("grad_weights", weight_type, rows * k) : nullptr,
        .indices = static_cast<int32_t*>(choices("indices", Type::i32, rows * k, k, columns)),
        .weights = numbers("weights", weight_type, rows * k),
        .bank = numbers("bank", type, vectors * length),
        .candidates = candidates(),
        .grad_logits = need_logits ? output("grad_logits", type, rows * columns) : nullptr,
        .grad_bank = need_bank ? output("grad_bank", type, vectors * length) : nullptr,
        .rows = rows,
        .columns = columns,
        .vectors = vectors,
        .length = length,
        .k = k};
    if (atomic) return run([&] { vblora_emulation::scatter(problem); });
    const int64_t bytes = static_cast<int64_t>(vblora_emulation::backward_workspace_bytes(problem));
    void* workspace = output("workspace", Type::u8, bytes);
    run([&] { vblora_emulation::admixture_backward(problem, workspace); });
  }
};

// `words`: an operator, and its options.
void solve(std::istream& words) {
  std::string op;
  words >> op;
  Options options;
  for (std::string word; words >> word;) {
    const size_t equals = word.find('=');
    options.given[word.substr(0, equals)] = word.substr(equals + 1);
  }
  vblora_emulation::start(static_cast<int>(options.number("order", 0)),
                          static_cast<uint64_t>(options.number("seed", 0)));
#ifndef __CUDACC__
  // sample=N first=M: the first M blocks of each launch, and every N-th of the others.
  vblora_emulation::sample(static_cast<uint64_t>(options.number("sample", 1)),
                           static_cast<uint64_t>(options.number("first", 0)));
#endif
  Problems problems{options};
  if (op == "admixture") problems.admixture();
  else if (op == "compose") problems.compose();
  else if (op == "add_updates") problems.add_updates();
  else if (op == "draw") problems.draw();
  else if (op == "draw_uniform") problems.draw_uniform();
  else if (op == "admixture_backward") problems.admixture_backward(false);
  else if (op == "scatter") problems.admixture_backward(true);
  else throw std::runtime_error("no operator of this name: " + op);
}

}  // namespace

int main(int argc, char** argv) {
  std::stringstream given;
  for (int i = 1; i < argc; ++i) given << argv[i] << ' ';
  std::string line = given.str();
  const bool many = line.starts_with('@');
  std::ifstream lines(many ? argv[1] + 1 : "");
  int failures = 0;
  while (!many || std::getline(lines, line)) {
    if (many) std::cout << line << ": " << std::flush;
    try {
      std::stringstream words(line);
      solve(words);
      std::cout << vblora_emulation::finish() << std::flush;
    } catch (const std::exception& error) {
      std::cerr << error.what() << std::endl;
      ++failures;
    }
    if (!many) break;
  }
  return failures ? 1 : 0;
}
