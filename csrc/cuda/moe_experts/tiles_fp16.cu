#include "cuda/moe_experts/tiles.cuh"

namespace kimi::cuda::experts {

template void run_tiles<Fp16>(const MoeExpertsParams&, const Workspace&, bool, int, cudaStream_t);

}  // namespace kimi::cuda::experts
