// Times oneCCL's collectives as `phalanx bench collectives` times ours: JSON lines {kind, bytes, median_s, best_s}.
// Arguments: seconds a cell, then sizes in bytes. In place and with separate buffers; the faster of the two counts.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <mpi.h>
#include <oneapi/ccl.hpp>
#include <vector>

static int rank, ranks;

static void carry_out(ccl::communicator &world, int kind, bool in_place, float *from, float *to, size_t elements) {
    size_t block = elements / ranks;
    if (kind == 0) {
        ccl::allreduce(in_place ? to : from, to, elements, ccl::reduction::sum, world).wait();
    } else if (kind == 1) {
        ccl::reduce_scatter(in_place ? to : from, in_place ? to + rank * block : to, block, ccl::reduction::sum, world).wait();
    } else {
        std::vector<size_t> counts(ranks, block);
        ccl::allgatherv(in_place ? to + rank * block : from, block, to, counts, world).wait();
    }
}

static double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

static double median_of(ccl::communicator &world, int kind, bool in_place, float *from, float *to, size_t elements, double budget, double &best) {
    size_t bytes = 4 * elements;
    int batch = bytes <= 65536 ? 20 : bytes <= 1 << 20 ? 4 : 1, go = 1;
    std::vector<double> own;
    double begin = seconds();
    carry_out(world, kind, in_place, from, to, elements);
    if (seconds() - begin > 0.002) batch = 1;
    MPI_Bcast(&batch, 1, MPI_INT, 0, MPI_COMM_WORLD);
    while (go) {
        ccl::barrier(world);
        double start = seconds();
        for (int i = 0; i < batch; i++) carry_out(world, kind, in_place, from, to, elements);
        own.push_back((seconds() - start) / batch);
        go = own.size() < 5 || seconds() - begin < budget;
        MPI_Bcast(&go, 1, MPI_INT, 0, MPI_COMM_WORLD);
    }
    std::vector<double> slowest(own.size());
    MPI_Reduce(own.data(), slowest.data(), own.size(), MPI_DOUBLE, MPI_MAX, 0, MPI_COMM_WORLD);
    std::sort(slowest.begin(), slowest.end());
    best = slowest[0];
    return slowest[slowest.size() / 2];
}

int main(int argc, char **argv) {
    static const char *names[] = {"all-reduce", "reduce-scatter", "all-gather"};
    ccl::init();
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    ccl::shared_ptr_class<ccl::kvs> kvs;
    ccl::kvs::address_type address;
    if (rank == 0) {
        kvs = ccl::create_main_kvs();
        address = kvs->get_address();
    }
    MPI_Bcast(address.data(), address.size(), MPI_BYTE, 0, MPI_COMM_WORLD);
    if (rank > 0) kvs = ccl::create_kvs(address);
    auto world = ccl::create_communicator(ranks, rank, kvs);
    for (int at = 2; at < argc; at++) {
        size_t elements = atol(argv[at]) / 4;
        std::vector<float> from(elements, 0.0f), to(elements, 0.0f);
        for (int kind = 0; kind < 3; kind++) {
            double best[2], median[2];
            for (int in_place = 0; in_place < 2; in_place++)
                median[in_place] = median_of(world, kind, in_place, from.data(), to.data(), elements, atof(argv[1]) / 2, best[in_place]);
            int faster = median[1] < median[0];
            if (rank == 0) {
                printf("{\"kind\": \"%s\", \"bytes\": %zu, \"median_s\": %.9f, \"best_s\": %.9f}\n", names[kind], 4 * elements, median[faster], best[faster]);
                fflush(stdout);
            }
        }
    }
    MPI_Finalize();
    return 0;
}
