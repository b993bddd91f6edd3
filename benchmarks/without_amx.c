// A process that does not see AMX, to measure what a CPU without it would run: CPUID is made to fault, and answered
// without the bits of the matrix tiles. For Linux on x86-64, and for Python alone (compilers that it starts are let be).
//
//   gcc -O1 -shared -fPIC benchmarks/without_amx.c -o without_amx.so
//   LD_PRELOAD=$PWD/without_amx.so NALORA_NATIVE=0 python benchmarks/versus_peft.py --dtype bfloat16 --shape 8x128

#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { kSetCpuid = 0x1012, kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25, kFp16 = 1u << 21 };

static void answer(int number, siginfo_t* info, void* context) {
  greg_t* r = ((ucontext_t*)context)->uc_mcontext.gregs;
  const unsigned char* at = (const unsigned char*)r[REG_RIP];
  if (at[0] != 0x0f || at[1] != 0xa2) {  // not CPUID: a real fault
    signal(SIGSEGV, SIG_DFL);
    return;
  }
  const unsigned leaf = r[REG_RAX], subleaf = r[REG_RCX];
  unsigned a = leaf, b, c = subleaf, d;
  syscall(SYS_arch_prctl, kSetCpuid, 1);
  __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  syscall(SYS_arch_prctl, kSetCpuid, 0);
  if (leaf == 7 && subleaf == 0) d &= ~(kBf16 | kTile | kInt8);
  if (leaf == 7 && subleaf == 1) a &= ~kFp16;
  r[REG_RAX] = a;
  r[REG_RBX] = b;
  r[REG_RCX] = c;
  r[REG_RDX] = d;
  r[REG_RIP] += 2;
}

__attribute__((constructor)) static void start(void) {
  if (strncmp(program_invocation_short_name, "python", 6) != 0) return;
  struct sigaction action;
  memset(&action, 0, sizeof(action));
  action.sa_sigaction = answer;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &action, NULL);
  syscall(SYS_arch_prctl, kSetCpuid, 0);
}
