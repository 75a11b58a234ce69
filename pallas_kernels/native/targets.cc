#include "targets.h"

namespace millrace {
namespace {

const Target* first = nullptr;  // set before any constructor runs

}  // namespace

Target::Target(const char* name, void* handler) : name(name), handler(handler), next(first) { first = this; }

}  // namespace millrace

extern "C" __attribute__((visibility("default"))) const millrace::Target* millrace_first_target() {
  return millrace::first;
}
