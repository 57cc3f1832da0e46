#include "kernels.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>

namespace vblora::cpu {

#define VBLORA_DECLARE(isa)                                                                                 \
  namespace isa {                                                                                           \
  void admixture(const Admixture&, int64_t, int64_t, void*);                                                \
  void compose(const Composition&, int64_t, int64_t, void*);                                                \
  void backward_logits(const AdmixtureBackward&, const Entries&, int64_t, int64_t);                         \
  void backward_bank(const AdmixtureBackward&, const Entries&, const BankPart&, int64_t, int64_t);          \
  void finish_bank(const AdmixtureBackward&, const BankPart&);                                              \
  void add_updates(const Update&, int64_t, int64_t, void*);                                                 \
  void draw(const Draw&, int64_t, int64_t, uint64_t*);                                                      \
  void update_rows(const UpdateBackward&, int64_t, int64_t);                                                \
  void update_columns(const UpdateBackward&, int64_t, int64_t);                                             \
  void draw_uniform(const UniformDraw&, int64_t, int64_t);                                                  \
  constexpr Kernels table{#isa,        admixture, compose,     backward_logits, backward_bank, finish_bank, \
                          add_updates, draw,      update_rows, update_columns,  draw_uniform};              \
  }

VBLORA_DECLARE(baseline)
#ifdef VBLORA_X86_ISAS
VBLORA_DECLARE(avx2)
VBLORA_DECLARE(avx512)
#endif

namespace {

const Kernels& choose() {
  const Kernels* available[] = {&baseline::table, nullptr, nullptr};  // best last
#ifdef VBLORA_X86_ISAS
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) available[1] = &avx2::table;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
    available[2] = &avx512::table;
#endif
  const char* wanted = std::getenv("VBLORA_CPU_ISA");
  const Kernels* best = nullptr;
  for (const Kernels* kernels : available)
    if (kernels && (!wanted || std::string_view(wanted) == kernels->name)) best = kernels;
  if (!best)
    throw std::runtime_error(
        "vblora: VBLORA_CPU_ISA is \"" + std::string(wanted) +
        "\"; allowed are baseline, and avx2 or avx512 if the machine supports them. Unset it to use the best.");
  return *best;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace vblora::cpu
