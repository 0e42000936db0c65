// What the headers beside this include, compiled once for all kernels: it takes longer than any of them.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <numeric>
#include <random>
#include <ucontext.h>
#include <utility>
#include <vector>
