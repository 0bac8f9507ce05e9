/* Times MPI's collectives as `phalanx bench collectives` times ours: JSON lines {kind, bytes, median_s, best_s}.
   Arguments: seconds a cell, then sizes in bytes. In place and with separate buffers; the faster of the two counts. */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST 100000

static int rank, ranks;

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void carry_out(int kind, int in_place, float *from, float *to, int elements) {
    int block = elements / ranks;
    if (kind == 0) {
        MPI_Allreduce(in_place ? MPI_IN_PLACE : from, to, elements, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
    } else if (kind == 1) {
        MPI_Reduce_scatter_block(in_place ? MPI_IN_PLACE : from, to, block, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
    } else {
        MPI_Allgather(in_place ? MPI_IN_PLACE : from, block, MPI_FLOAT, to, block, MPI_FLOAT, MPI_COMM_WORLD);
    }
}

static void check(int kind, float *from, float *to, int elements) {
    int block = elements / ranks, sum = ranks * (ranks - 1) / 2;
    for (int i = 0; i < elements; i++) from[i] = rank + i % 1021;
    carry_out(kind, 0, from, to, elements);
    for (int i = 0; i < (kind == 1 ? block : elements); i++) {
        int at = kind == 1 ? rank * block + i : i;
        float expected = kind == 2 ? i / block + (i % block) % 1021 : sum + ranks * (at % 1021);
        if (to[i] != expected) {
            fprintf(stderr, "wrong result of kind %d at %d: %f, not %f\n", kind, i, to[i], expected);
            MPI_Abort(MPI_COMM_WORLD, 1);
        }
    }
    memset(from, 0, elements * sizeof(float));
    memset(to, 0, elements * sizeof(float));
}

static double median_of(int kind, int in_place, float *from, float *to, int elements, double budget, double *best) {
    static double own[MOST], slowest[MOST];
    int bytes = 4 * elements, batch = bytes <= 65536 ? 20 : bytes <= 1 << 20 ? 4 : 1, count = 0, go = 1;
    double begin = MPI_Wtime();
    carry_out(kind, in_place, from, to, elements);
    if (MPI_Wtime() - begin > 0.002) batch = 1;
    MPI_Bcast(&batch, 1, MPI_INT, 0, MPI_COMM_WORLD);
    while (go) {
        MPI_Barrier(MPI_COMM_WORLD);
        double start = MPI_Wtime();
        for (int i = 0; i < batch; i++) carry_out(kind, in_place, from, to, elements);
        own[count++] = (MPI_Wtime() - start) / batch;
        go = count < MOST && (count < 5 || MPI_Wtime() - begin < budget);
        MPI_Bcast(&go, 1, MPI_INT, 0, MPI_COMM_WORLD);
    }
    MPI_Reduce(own, slowest, count, MPI_DOUBLE, MPI_MAX, 0, MPI_COMM_WORLD);
    qsort(slowest, count, sizeof(double), ascending);
    *best = slowest[0];
    return slowest[count / 2];
}

int main(int argc, char **argv) {
    static const char *names[] = {"all-reduce", "reduce-scatter", "all-gather"};
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    for (int at = 2; at < argc; at++) {
        int elements = atoi(argv[at]) / 4;
        float *from = malloc(elements * sizeof(float)), *to = malloc(elements * sizeof(float));
        for (int kind = 0; kind < 3; kind++) {
            double best[2], median[2];
            check(kind, from, to, elements);
            for (int in_place = 0; in_place < 2; in_place++)
                median[in_place] = median_of(kind, in_place, from, to, elements, atof(argv[1]) / 2, &best[in_place]);
            int faster = median[1] < median[0];
            if (rank == 0) {
                printf("{\"kind\": \"%s\", \"bytes\": %d, \"median_s\": %.9f, \"best_s\": %.9f}\n", names[kind], 4 * elements, median[faster], best[faster]);
                fflush(stdout);
            }
        }
        free(from);
        free(to);
    }
    MPI_Finalize();
    return 0;
}
