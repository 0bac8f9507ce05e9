/* Stands in for NCCL and the CUDA runtime where there is no GPU: their C interface, carried out by the threads of a
   process in ordinary memory. It is strict where they are: what NCCL works on must lie in a GPU's memory, and copies
   go between that and pinned memory. A transfer of exactly HANGS elements never ends until its communicator is
   aborted. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { RANKS = 16, RANGES = 256, HANGS = 13 };
typedef struct { char bytes[128]; } unique_id;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static _Thread_local const char *last = "";

/* Memory. */
static struct { char *start; size_t bytes; int pinned; } ranges[RANGES];

static int take(void **at, size_t bytes, int pinned) {
    pthread_mutex_lock(&lock);
    int i = 0;
    while (i < RANGES && ranges[i].start) i++;
    if (i < RANGES) {
        ranges[i].start = *at = malloc(bytes);
        ranges[i].bytes = bytes;
        ranges[i].pinned = pinned;
    }
    pthread_mutex_unlock(&lock);
    return i < RANGES ? 0 : 2;
}

static int give(void *at, int pinned) {
    int code = 1;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < RANGES; i++)
        if (at && ranges[i].start == at && ranges[i].pinned == pinned) {
            free(at);
            ranges[i].start = NULL;
            code = 0;
        }
    pthread_mutex_unlock(&lock);
    return code;
}

static int lies(const void *at, size_t bytes, int pinned) {
    int found = bytes == 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < RANGES; i++) {
        const char *start = ranges[i].start, *from = at;
        found |= start && ranges[i].pinned == pinned && start <= from && from + bytes <= start + ranges[i].bytes;
    }
    pthread_mutex_unlock(&lock);
    return found;
}

/* The CUDA runtime. */
typedef struct { struct comm *hangs; } stream;

int cudaGetDeviceCount(int *count) { *count = 2; return 0; }
int cudaSetDevice(int device) { return device == 0 || device == 1 ? 0 : 101; }
int cudaMalloc(void **at, size_t bytes) { return take(at, bytes, 0); }
int cudaFree(void *at) { return give(at, 0); }
int cudaMallocHost(void **at, size_t bytes) { return take(at, bytes, 1); }
int cudaFreeHost(void *at) { return give(at, 1); }
int cudaStreamCreate(stream **made) { *made = calloc(1, sizeof **made); return 0; }
int cudaStreamDestroy(stream *gone) { free(gone); return 0; }
int cudaStreamQuery(stream *asked) { return asked->hangs ? 600 : 0; }
const char *cudaGetErrorString(int code) { return code == 1 ? "invalid argument" : "some error"; }

int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int way, stream *on) {
    int to_device = way == 1;
    if ((way != 1 && way != 2) || !lies(to, bytes, !to_device) || !lies(from, bytes, to_device)) return 1;
    if (!on->hangs && bytes) memcpy(to, from, bytes);
    return 0;
}

/* NCCL. */
struct world {
    unique_id id;
    int ranks, here, round, arrived;
    const float *given[RANKS];
    const float *mail[RANKS][RANKS];
    size_t mail_count[RANKS][RANKS];
    struct world *next;
};
struct comm { struct world *world; int rank, aborted; };
static struct world *worlds;

int ncclGetVersion(int *version) { *version = 22703; return 0; }
const char *ncclGetErrorString(int code) { return code == 4 ? "invalid argument" : "some error"; }
const char *ncclGetLastError(struct comm *comm) { (void)comm; return last; }
int ncclCommGetAsyncError(struct comm *comm, int *state) { (void)comm; *state = 0; return 0; }
int ncclCommAbort(struct comm *comm) { comm->aborted = 1; return 0; }
int ncclCommDestroy(struct comm *comm) { free(comm); return 0; }

int ncclGetUniqueId(unique_id *id) {
    static int number;
    memset(id, 0, sizeof *id);
    pthread_mutex_lock(&lock);
    snprintf(id->bytes, sizeof id->bytes, "stand-in %d", ++number);
    pthread_mutex_unlock(&lock);
    return 0;
}

/* Until all ranks have come. */
static void meet(struct world *world) {
    pthread_mutex_lock(&lock);
    int round = world->round;
    if (++world->arrived == world->ranks) {
        world->arrived = 0;
        world->round++;
        pthread_cond_broadcast(&changed);
    }
    while (world->round == round) pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
}

int ncclCommInitRank(struct comm **made, int ranks, unique_id id, int rank) {
    if (ranks < 1 || ranks > RANKS || rank < 0 || rank >= ranks || !id.bytes[0]) return 4;
    pthread_mutex_lock(&lock);
    struct world *world = worlds;
    while (world && memcmp(&world->id, &id, sizeof id)) world = world->next;
    if (!world) {
        world = calloc(1, sizeof *world);
        world->id = id;
        world->ranks = ranks;
        world->next = worlds;
        worlds = world;
    }
    pthread_mutex_unlock(&lock);
    struct comm *comm = calloc(1, sizeof *comm);
    comm->world = world;
    comm->rank = rank;
    meet(world);
    *made = comm;
    return 0;
}

/* What is wrong with a call, else whether it hangs. */
static int refuses(struct comm *comm, stream *on, const void *memory, size_t bytes, size_t count, int type) {
    last = "";
    if (!lies(memory, bytes, 0)) { last = "that is no memory of a GPU"; return 4; }
    if (type != 7) { last = "the stand-in knows floats"; return 4; }
    if (count == HANGS) on->hangs = comm;
    return 0;
}

int ncclAllReduce(const float *from, float *to, size_t count, int type, int op, struct comm *comm, stream *on) {
    struct world *world = comm->world;
    int code = refuses(comm, on, from, 4 * count, count, type);
    if (code || op) return code ? code : 4;
    if (on->hangs) return 0;
    world->given[comm->rank] = from;
    meet(world);
    float *sum = calloc(count + 1, 4);
    for (int rank = 0; rank < world->ranks; rank++)
        for (size_t i = 0; i < count; i++) sum[i] += world->given[rank][i];
    meet(world);
    memcpy(to, sum, 4 * count);
    free(sum);
    return 0;
}

int ncclReduceScatter(const float *from, float *to, size_t count, int type, int op, struct comm *comm, stream *on) {
    struct world *world = comm->world;
    int code = refuses(comm, on, from, 4 * count * world->ranks, count, type);
    if (code || op || !lies(to, 4 * count, 0)) return code ? code : 4;
    world->given[comm->rank] = from;
    meet(world);
    float *sum = calloc(count + 1, 4);
    for (int rank = 0; rank < world->ranks; rank++)
        for (size_t i = 0; i < count; i++) sum[i] += world->given[rank][comm->rank * count + i];
    meet(world);
    memcpy(to, sum, 4 * count);
    free(sum);
    return 0;
}

int ncclAllGather(const float *from, float *to, size_t count, int type, struct comm *comm, stream *on) {
    struct world *world = comm->world;
    int code = refuses(comm, on, to, 4 * count * world->ranks, count, type);
    if (code || !lies(from, 4 * count, 0)) return code ? code : 4;
    world->given[comm->rank] = from;
    meet(world);
    for (int rank = 0; rank < world->ranks; rank++) memmove(to + rank * count, world->given[rank], 4 * count);
    meet(world);
    return 0;
}

int ncclBroadcast(const float *from, float *to, size_t count, int type, int root, struct comm *comm, stream *on) {
    struct world *world = comm->world;
    int code = refuses(comm, on, to, 4 * count, count, type);
    if (code || !lies(from, 4 * count, 0)) return code ? code : 4;
    world->given[comm->rank] = from;
    meet(world);
    memmove(to, world->given[root], 4 * count);
    meet(world);
    return 0;
}

int ncclSend(const float *from, size_t count, int type, int peer, struct comm *comm, stream *on) {
    struct world *world = comm->world;
    int code = refuses(comm, on, from, 4 * count, count, type);
    if (code) return code;
    pthread_mutex_lock(&lock);
    const float **mail = &world->mail[comm->rank][peer];
    world->mail_count[comm->rank][peer] = count;
    *mail = from;
    pthread_cond_broadcast(&changed);
    while (*mail) pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
    return 0;
}

int ncclRecv(float *to, size_t count, int type, int peer, struct comm *comm, stream *on) {
    struct world *world = comm->world;
    int code = refuses(comm, on, to, 4 * count, count, type);
    if (code) return code;
    pthread_mutex_lock(&lock);
    const float **mail = &world->mail[peer][comm->rank];
    while (!*mail) pthread_cond_wait(&changed, &lock);
    code = world->mail_count[peer][comm->rank] == count ? 0 : 5;
    if (!code) memcpy(to, *mail, 4 * count);
    *mail = NULL;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
    return code;
}
