// A CUDA driver without a GPU: libcuda.so.1 as far as kvswitch uses it, for cuda-python's own
// bindings to run above. Device memory is host memory; each stream is a thread.
//
// It is as strict as the real one where code goes wrong unnoticed:
//   * work takes effect late: never during the call, after a random pause, in stream order;
//   * each direction has one copy engine, which stays with a stream as long as that has copies ready
//     and then goes to who has waited longest, whatever the priority;
//   * copies of a batch and pieces of a kernel run in random order;
//   * with access order ANY, sources are read at once, before what the stream waits for;
//   * a wait on an event that has not been recorded does not wait, and one on an event that is
//     recorded again later waits for the older recording;
//   * arguments are checked: live handles, a current context, the event's and the stream's context,
//     memory that is allocated or registered, copies inside one allocation and one registration;
//   * an asynchronous failure is sticky: every later call fails, events are never reached;
//   * calls that would spoil a graph capture in another thread do.
// Any function can be told to fail (fake_fail).

#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum {
    SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, INVALID_DEVICE = 101,
    INVALID_IMAGE = 200, INVALID_CONTEXT = 201, INVALID_HANDLE = 400, NOT_FOUND = 500,
    NOT_READY = 600, ILLEGAL_ADDRESS = 700, ALREADY_REGISTERED = 712, NOT_REGISTERED = 713,
    NOT_SUPPORTED = 801, CAPTURE_UNSUPPORTED = 900,
};
enum { DEVICES = 2, RELAXED = 2, MAPPED = 2, PORTABLE = 1, PIECES = 1024 };
typedef uint64_t word;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;

typedef struct { int device, references; } Context;
typedef struct { word base, nbytes; int device, flags; } Range;  // device -1: registered host memory
typedef struct { int reached; double time; } Mark;  // one recording; leaked: work under way may refer to it
typedef struct { Context* context; int is_event; Mark* newest; unsigned flags; } Event;
typedef struct Work {
    enum { COPIES, KERNEL, RECORD, WAIT } kind;
    Mark* mark;
    word count, *dst, *src, *nbytes;
    char* early;  // what ANY order has read already
    struct Work* next;
} Work;
typedef struct {
    Context* context;
    int is_event;
    Work *head, *tail;
    pthread_t thread;
    int ending;
} Stream;

static struct { Stream* owner; word next, serving; } engines[2];  // by direction: a queue of tickets
static Context contexts[DEVICES];
static Stream* defaults[DEVICES];
static void* live[1 << 14];  // events and streams
static int num_live, num_ranges;
static Range ranges[1 << 12];

static struct {
    int version, devices, lost, capturing, spoiled;
    word pause_us, bandwidth, device_memory, pinnable, seed, break_in;
    char fail[64];
    int fail_in, fail_code;
} now;
static struct { const char* name; long calls; } counts[128];
static __thread Context* stack[16];
static __thread int depth, mode;

static word draw(void) {
    now.seed ^= now.seed << 13, now.seed ^= now.seed >> 7, now.seed ^= now.seed << 17;
    return now.seed;
}
static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// ---- entering a call ---------------------------------------------------------------------------

enum { PLAIN = 0, CONTEXT = 1, UNSAFE = 2 };  // needs a current context; may spoil a capture

static int enter(const char* name, int needs) {
    pthread_mutex_lock(&lock);
    for (int i = 0; i < 128; i++) {
        if (!counts[i].name) counts[i].name = name;
        if (!strcmp(counts[i].name, name)) { counts[i].calls++; break; }
    }
    if (now.fail_in && !strcmp(now.fail, name) && !--now.fail_in) return now.fail_code;
    if (now.lost && needs & CONTEXT) return now.lost;
    if (needs & CONTEXT && !depth) return INVALID_CONTEXT;
    if (needs & UNSAFE && now.capturing && mode != RELAXED) { now.spoiled = 1; return CAPTURE_UNSUPPORTED; }
    return SUCCESS;
}
static int leave(int code) { pthread_mutex_unlock(&lock); return code; }
#define ENTER(needs) do { int code_ = enter(__func__, needs); if (code_) return leave(code_); } while (0)
#define REQUIRE(condition, code) do { if (!(condition)) return leave(code); } while (0)

static int is_live(void* handle) {
    for (int i = 0; i < num_live; i++) if (live[i] == handle) return 1;
    return 0;
}
static void forget(void* handle) {
    for (int i = 0; i < num_live; i++) if (live[i] == handle) live[i] = live[--num_live];
}
static Context* current(void) { return stack[depth - 1]; }

// ---- streams -----------------------------------------------------------------------------------

static void move(Work* work, word i) {
    if (work->early) {
        word offset = 0;
        for (word k = 0; k < i; k++) offset += work->nbytes[k];
        memcpy((void*)work->dst[i], work->early + offset, work->nbytes[i]);
    } else {
        memcpy((void*)work->dst[i], (void*)work->src[i], work->nbytes[i]);
    }
}
static void run(Work* work) {  // without the lock
    word total = 0, *order = malloc(sizeof(word) * work->count);
    for (word i = 0; i < work->count; i++) {
        total += work->nbytes[i];
        word j = draw() % (i + 1);
        order[i] = order[j], order[j] = i;
    }
    word us = now.pause_us ? draw() % now.pause_us : 0;
    if (now.bandwidth) us += total * 1000000 / now.bandwidth;
    usleep((unsigned)(us / 2));
    for (word i = 0; i < work->count / 2; i++) move(work, order[i]);
    usleep((unsigned)(us - us / 2));
    for (word i = work->count / 2; i < work->count; i++) move(work, order[i]);
    free(order);
}
static int direction_of(Work* work);
static void take_engine(Stream* stream, int direction) {
    if (engines[direction].owner == stream) return;
    word ticket = engines[direction].next++;
    while ((engines[direction].owner || engines[direction].serving != ticket) && !now.lost)
        pthread_cond_wait(&changed, &lock);
    engines[direction].owner = stream;
    engines[direction].serving = ticket + 1;
}
static void leave_engine(Stream* stream, int direction) {
    Work* next = stream->head;
    if (next && next->kind == COPIES && direction_of(next) == direction && !now.lost) return;
    engines[direction].owner = NULL;
    pthread_cond_broadcast(&changed);
}
static void* serve(void* argument) {
    Stream* stream = argument;
    pthread_mutex_lock(&lock);
    for (;;) {
        while (!stream->head && !stream->ending) pthread_cond_wait(&changed, &lock);
        Work* work = stream->head;
        if (!work) break;
        int copying = work->kind == COPIES && !now.lost, direction = copying ? direction_of(work) : 0;
        if (copying) take_engine(stream, direction);
        if ((copying || work->kind == KERNEL) && !now.lost) {
            if (now.break_in && !--now.break_in) {
                now.lost = ILLEGAL_ADDRESS;
            } else {
                pthread_mutex_unlock(&lock);
                run(work);
                pthread_mutex_lock(&lock);
            }
        }
        while (work->kind == WAIT && !now.lost && !work->mark->reached)
            pthread_cond_wait(&changed, &lock);
        if (work->kind == RECORD && !now.lost) {
            work->mark->reached = 1;
            work->mark->time = seconds();
        }
        stream->head = work->next;
        if (!stream->head) stream->tail = NULL;
        if (copying) leave_engine(stream, direction);
        free(work->dst), free(work->src), free(work->nbytes), free(work->early), free(work);
        pthread_cond_broadcast(&changed);
    }
    pthread_mutex_unlock(&lock);
    return NULL;
}
static Stream* new_stream(Context* context) {
    Stream* stream = calloc(1, sizeof *stream);
    stream->context = context;
    live[num_live++] = stream;
    pthread_create(&stream->thread, NULL, serve, stream);
    return stream;
}
static Stream* find_stream(void* handle) {  // NULL: no such stream
    if ((word)handle <= 2) {
        int device = current()->device;
        if (!defaults[device]) defaults[device] = new_stream(&contexts[device]);
        return defaults[device];
    }
    return is_live(handle) ? handle : NULL;
}
static void give(Stream* stream, Work* work) {
    if (stream->tail) stream->tail->next = work; else stream->head = work;
    stream->tail = work;
    pthread_cond_broadcast(&changed);
}
static int idle(Stream* stream) {
    while (stream->head && !now.lost) pthread_cond_wait(&changed, &lock);
    return now.lost;
}

// ---- memory ------------------------------------------------------------------------------------

static Range* holding(word address, word nbytes) {
    for (int i = 0; i < num_ranges; i++)
        if (ranges[i].base <= address && address + nbytes <= ranges[i].base + ranges[i].nbytes) return &ranges[i];
    return NULL;
}
static int direction_of(Work* work) {  // 0: device to host
    Range* to = holding(work->dst[0], work->nbytes[0]);
    return to && to->device >= 0;
}
static int between(Context* context, word dst, word src, word nbytes) {
    Range *to = holding(dst, nbytes), *from = holding(src, nbytes);
    if (!nbytes || !to || !from || (to->device < 0) == (from->device < 0)) return 0;
    Range *host = to->device < 0 ? to : from, *device = to->device < 0 ? from : to;
    return device->device == context->device && (host->flags & PORTABLE);
}
static word* kept(const word* array, word count) {
    return memcpy(malloc(sizeof(word) * count), array, sizeof(word) * count);
}
static int by_start(const void* a, const void* b) {
    word x = *(const word*)a, y = *(const word*)b;
    return x < y ? -1 : x > y;
}
static int apart(const word* dst, const word* nbytes, word count) {  // undefined otherwise
    word(*spans)[2] = malloc(16 * count);
    for (word i = 0; i < count; i++) spans[i][0] = dst[i], spans[i][1] = nbytes[i];
    qsort(spans, count, 16, by_start);
    int good = 1;
    for (word i = 1; i < count; i++) good &= spans[i - 1][0] + spans[i - 1][1] <= spans[i][0];
    free(spans);
    return good;
}
static Work* copies(const word* dst, const word* src, const word* nbytes, word count, int any) {
    Work* work = calloc(1, sizeof *work);
    *work = (Work){COPIES, NULL, count, kept(dst, count), kept(src, count), kept(nbytes, count), NULL, NULL};
    if (any) {
        word total = 0;
        for (word i = 0; i < count; i++) total += nbytes[i];
        work->early = malloc(total);
        total = 0;
        for (word i = 0; i < count; i++) memcpy(work->early + total, (void*)src[i], nbytes[i]), total += nbytes[i];
    }
    return work;
}

int cuMemAlloc_v2(word* address, size_t nbytes) {
    ENTER(CONTEXT | UNSAFE);
    REQUIRE(nbytes, INVALID_VALUE);
    word used = 0;
    for (int i = 0; i < num_ranges; i++) used += ranges[i].device >= 0 ? ranges[i].nbytes : 0;
    REQUIRE(used + nbytes <= now.device_memory, OUT_OF_MEMORY);
    *address = (word)aligned_alloc(512, (nbytes + 511) / 512 * 512);
    memset((void*)*address, 0xEE, nbytes);
    ranges[num_ranges++] = (Range){*address, nbytes, current()->device, 0};
    return leave(SUCCESS);
}
int cuMemFree_v2(word address) {
    ENTER(CONTEXT | UNSAFE);
    for (int i = 0; i < num_ranges; i++)
        if (ranges[i].base == address && ranges[i].device >= 0) {
            ranges[i] = ranges[--num_ranges];
            free((void*)address);
            return leave(SUCCESS);
        }
    return leave(INVALID_VALUE);
}
int cuMemHostRegister_v2(word address, size_t nbytes, unsigned flags) {
    ENTER(CONTEXT | UNSAFE);
    word pinned = 0;
    REQUIRE(nbytes && address, INVALID_VALUE);
    for (int i = 0; i < num_ranges; i++) {
        if (ranges[i].device < 0) pinned += ranges[i].nbytes;
        REQUIRE(address + nbytes <= ranges[i].base || ranges[i].base + ranges[i].nbytes <= address, ALREADY_REGISTERED);
    }
    REQUIRE(pinned + nbytes <= now.pinnable, OUT_OF_MEMORY);
    ranges[num_ranges++] = (Range){address, nbytes, -1, (int)flags};
    return leave(SUCCESS);
}
int cuMemHostUnregister(word address) {
    ENTER(CONTEXT | UNSAFE);
    for (int i = 0; i < num_ranges; i++)
        if (ranges[i].base == address && ranges[i].device < 0) {
            ranges[i] = ranges[--num_ranges];
            return leave(SUCCESS);
        }
    return leave(NOT_REGISTERED);
}
int cuPointerGetAttribute(void* data, int attribute, word address) {
    ENTER(PLAIN);
    Range* range = holding(address, 1);
    REQUIRE(range, INVALID_VALUE);
    if (attribute == 2) *(unsigned*)data = range->device < 0 ? 1 : 2;  // memory type
    else if (attribute == 9) *(int*)data = range->device < 0 ? 0 : range->device;
    else return leave(INVALID_VALUE);
    return leave(SUCCESS);
}
static int at_once(word dst, word src, word nbytes) {
    memcpy((void*)dst, (void*)src, nbytes);
    return leave(SUCCESS);
}
int cuMemcpyHtoD_v2(word dst, const void* src, size_t nbytes) {
    ENTER(CONTEXT | UNSAFE);
    REQUIRE(holding(dst, nbytes), INVALID_VALUE);
    return at_once(dst, (word)src, nbytes);
}
int cuMemcpyDtoH_v2(void* dst, word src, size_t nbytes) {
    ENTER(CONTEXT | UNSAFE);
    REQUIRE(holding(src, nbytes), INVALID_VALUE);
    return at_once((word)dst, src, nbytes);
}

// ---- copies ------------------------------------------------------------------------------------

int cuMemcpyAsync(word dst, word src, size_t nbytes, void* handle) {
    ENTER(CONTEXT);
    Stream* stream = find_stream(handle);
    REQUIRE(stream && stream->context == current(), INVALID_HANDLE);
    REQUIRE(between(stream->context, dst, src, nbytes), INVALID_VALUE);
    give(stream, copies(&dst, &src, &nbytes, 1, 0));
    return leave(SUCCESS);
}
static int batch(word* dst, word* src, word* nbytes, word count, int* attributes, word* first, word kinds, void* handle) {
    REQUIRE((word)handle > 1, INVALID_VALUE);  // not the legacy default stream
    Stream* stream = find_stream(handle);
    REQUIRE(stream && stream->context == current(), INVALID_HANDLE);
    REQUIRE(count && dst && src && nbytes && kinds == 1 && attributes && first && !first[0], INVALID_VALUE);
    REQUIRE(attributes[0] >= 1 && attributes[0] <= 3, INVALID_VALUE);
    for (word i = 0; i < count; i++) REQUIRE(between(stream->context, dst[i], src[i], nbytes[i]), INVALID_VALUE);
    REQUIRE(apart(dst, nbytes, count), INVALID_VALUE);
    give(stream, copies(dst, src, nbytes, count, attributes[0] != 1));
    return leave(SUCCESS);
}
int cuMemcpyBatchAsync(word* dst, word* src, word* nbytes, word count, int* attributes, word* first, word kinds, word* failed, void* stream) {
    ENTER(CONTEXT);
    REQUIRE(failed, INVALID_VALUE);
    return batch(dst, src, nbytes, count, attributes, first, kinds, stream);
}
int cuMemcpyBatchAsync_v2(word* dst, word* src, word* nbytes, word count, int* attributes, word* first, word kinds, void* stream) {
    ENTER(CONTEXT);
    return batch(dst, src, nbytes, count, attributes, first, kinds, stream);
}

// ---- the kernel --------------------------------------------------------------------------------

static char function[] = "copy_runs";
static int modules;

int cuModuleLoadData(void** module, const void* image) {
    ENTER(CONTEXT | UNSAFE);
    REQUIRE(!memcmp(image, "\177ELF", 4), INVALID_IMAGE);
    *module = function;
    modules++;
    return leave(SUCCESS);
}
int cuModuleUnload(void* module) {
    ENTER(CONTEXT | UNSAFE);
    REQUIRE(module == function && modules, INVALID_HANDLE);
    modules--;
    return leave(SUCCESS);
}
int cuModuleGetFunction(void** found, void* module, const char* name) {
    ENTER(CONTEXT);
    REQUIRE(module == function, INVALID_HANDLE);
    REQUIRE(!strcmp(name, function), NOT_FOUND);
    *found = function;
    return leave(SUCCESS);
}
int cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void* handle, void** parameters, void** extra) {
    ENTER(CONTEXT);
    Stream* stream = find_stream(handle);
    REQUIRE(f == function && stream && stream->context == current(), INVALID_HANDLE);
    REQUIRE(gx && bx && bx <= 1024 && gy * gz * by * bz == 1 && !shared && !extra, INVALID_VALUE);
    word *runs = parameters[0], count = runs[0], *dst = runs + 1, *src = dst + PIECES, *nbytes = src + PIECES;
    REQUIRE(count && count <= PIECES, INVALID_VALUE);
    Work* work = copies(dst, src, nbytes, count, 0);
    work->kind = KERNEL;
    for (word i = 0; i < count; i++)  // a real kernel would fault, later
        if (!between(stream->context, dst[i], src[i], nbytes[i])) now.break_in = 1;
    give(stream, work);
    return leave(SUCCESS);
}

// ---- streams and events, as called -------------------------------------------------------------

int cuCtxGetStreamPriorityRange(int* lowest, int* highest) {
    ENTER(CONTEXT);
    *lowest = 0, *highest = -5;
    return leave(SUCCESS);
}
int cuStreamCreateWithPriority(void** stream, unsigned flags, int priority) {
    ENTER(CONTEXT);
    REQUIRE(flags <= 1 && priority <= 0 && priority >= -5, INVALID_VALUE);
    *stream = new_stream(current());
    return leave(SUCCESS);
}
int cuStreamSynchronize(void* handle) {
    ENTER(CONTEXT | UNSAFE);
    Stream* stream = find_stream(handle);
    REQUIRE(stream, INVALID_HANDLE);
    return leave(idle(stream));
}
int cuStreamDestroy_v2(void* handle) {
    ENTER(CONTEXT);
    REQUIRE((word)handle > 2 && is_live(handle), INVALID_HANDLE);
    Stream* stream = handle;
    forget(stream);
    stream->ending = 1;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
    pthread_join(stream->thread, NULL);
    free(stream);
    return SUCCESS;
}
int cuStreamWaitEvent(void* handle, Event* event, unsigned flags) {
    ENTER(CONTEXT);
    Stream* stream = find_stream(handle);
    REQUIRE(stream && is_live(event), INVALID_HANDLE);
    REQUIRE(!flags, INVALID_VALUE);
    if (event->newest && !event->newest->reached) {
        Work* work = calloc(1, sizeof *work);
        *work = (Work){WAIT, event->newest, 0, NULL, NULL, NULL, NULL, NULL};
        give(stream, work);
    }
    return leave(SUCCESS);
}
int cuEventCreate(void** event, unsigned flags) {
    ENTER(CONTEXT);
    REQUIRE(flags < 4, INVALID_VALUE);
    Event* made = calloc(1, sizeof *made);
    made->context = current(), made->is_event = 1, made->flags = flags;
    *event = live[num_live++] = made;
    return leave(SUCCESS);
}
int cuEventDestroy_v2(Event* event) {
    ENTER(PLAIN);
    REQUIRE(is_live(event), INVALID_HANDLE);
    forget(event);  // leaked: work under way may refer to it
    return leave(SUCCESS);
}
int cuEventRecord(Event* event, void* handle) {
    ENTER(CONTEXT);
    Stream* stream = find_stream(handle);
    REQUIRE(stream && is_live(event) && event->context == stream->context, INVALID_HANDLE);
    Work* work = calloc(1, sizeof *work);
    *work = (Work){RECORD, event->newest = calloc(1, sizeof(Mark)), 0, NULL, NULL, NULL, NULL, NULL};
    give(stream, work);
    return leave(SUCCESS);
}
int cuEventQuery(Event* event) {
    ENTER(CONTEXT | UNSAFE);
    REQUIRE(is_live(event), INVALID_HANDLE);
    return leave(event->newest && !event->newest->reached ? NOT_READY : SUCCESS);
}
int cuEventSynchronize(Event* event) {
    ENTER(CONTEXT | UNSAFE);
    REQUIRE(is_live(event), INVALID_HANDLE);
    Mark* mark = event->newest;
    while (mark && !mark->reached && !now.lost) pthread_cond_wait(&changed, &lock);
    return leave(mark && !mark->reached ? now.lost : SUCCESS);
}
int cuEventElapsedTime(float* ms, Event* begin, Event* end) {
    ENTER(CONTEXT);
    REQUIRE(is_live(begin) && is_live(end) && begin->newest && end->newest, INVALID_HANDLE);
    REQUIRE(!((begin->flags | end->flags) & 2), INVALID_HANDLE);  // timing disabled
    REQUIRE(begin->newest->reached && end->newest->reached, NOT_READY);
    *ms = (float)((end->newest->time - begin->newest->time) * 1e3);
    return leave(SUCCESS);
}
int cuEventElapsedTime_v2(float* ms, Event* begin, Event* end) { return cuEventElapsedTime(ms, begin, end); }
int cuThreadExchangeStreamCaptureMode(int* mode_) {
    ENTER(PLAIN);
    int before = mode;
    mode = *mode_, *mode_ = before;
    return leave(SUCCESS);
}

// ---- devices and contexts ----------------------------------------------------------------------

int cuInit(unsigned flags) {
    (void)flags;
    ENTER(PLAIN);
    return leave(now.devices ? SUCCESS : NO_DEVICE);
}
int cuDriverGetVersion(int* version) { ENTER(PLAIN); *version = now.version; return leave(SUCCESS); }
int cuDeviceGetCount(int* count) { ENTER(PLAIN); *count = now.devices; return leave(SUCCESS); }
int cuDeviceGet(int* device, int ordinal) {
    ENTER(PLAIN);
    REQUIRE(ordinal >= 0 && ordinal < now.devices, INVALID_DEVICE);
    *device = ordinal;
    return leave(SUCCESS);
}
int cuDeviceGetName(char* name, int length, int device) {
    ENTER(PLAIN);
    snprintf(name, (size_t)length, "Fake GPU %d", device);
    return leave(SUCCESS);
}
int cuDeviceGetUuid_v2(char* uuid, int device) { ENTER(PLAIN); memset(uuid, device, 16); return leave(SUCCESS); }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
    ENTER(PLAIN);
    (void)device;
    *value = attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == 91 ? 1 : attribute == 40 ? 3 : 0;
    return leave(SUCCESS);
}
int cuDevicePrimaryCtxRetain(void** context, int device) {
    ENTER(PLAIN);
    REQUIRE(device >= 0 && device < now.devices, INVALID_DEVICE);
    contexts[device].device = device;
    contexts[device].references++;
    *context = &contexts[device];
    return leave(SUCCESS);
}
int cuDevicePrimaryCtxRelease_v2(int device) {
    ENTER(PLAIN);
    REQUIRE(contexts[device].references > 0, INVALID_CONTEXT);
    if (!--contexts[device].references)  // events go with their context; streams are to be closed
        for (int i = num_live; i--;)
            if (((Event*)live[i])->is_event && ((Event*)live[i])->context == &contexts[device]) live[i] = live[--num_live];
    return leave(SUCCESS);
}
int cuCtxPushCurrent_v2(Context* context) {
    ENTER(PLAIN);
    REQUIRE(context && context->references, INVALID_CONTEXT);
    stack[depth++] = context;
    return leave(SUCCESS);
}
int cuCtxPopCurrent_v2(void** context) {
    ENTER(PLAIN);
    REQUIRE(depth, INVALID_CONTEXT);
    *context = stack[--depth];
    return leave(SUCCESS);
}
int cuCtxSetCurrent(Context* context) {
    ENTER(PLAIN);
    if (depth) depth--;
    if (context) stack[depth++] = context;
    return leave(SUCCESS);
}
int cuCtxGetCurrent(void** context) { ENTER(PLAIN); *context = depth ? current() : NULL; return leave(SUCCESS); }
int cuGetExportTable(const void** table, const void* id) {  // NVRTC asks
    (void)id;
    *table = NULL;
    return NOT_FOUND;
}
int cuGetErrorString(int code, const char** text) {
    *text = code == OUT_OF_MEMORY ? "out of memory" : code == ILLEGAL_ADDRESS ? "an illegal memory access was encountered" : "an error";
    return SUCCESS;
}

// ---- finding functions -------------------------------------------------------------------------

static int not_here(void) { return NOT_SUPPORTED; }  // all that the real one has beside these

int cuGetProcAddress_v2(const char* name, void** found, int version, word flags, int* status) {
    (void)flags;
    static void* self;
    char newer[128];
    Dl_info info;
    if (!self && dladdr((void*)cuInit, &info)) self = dlopen(info.dli_fname, RTLD_NOW);
    snprintf(newer, sizeof newer, "%s_v2", name);
    int batches = !strcmp(name, "cuMemcpyBatchAsync"), old = batches && version < 13000;
    void* symbol = old ? NULL : dlsym(self, newer);
    if (!symbol) symbol = dlsym(self, name);
    if (!symbol) symbol = (void*)not_here;
    if (version > now.version || (batches && version < 12080)) symbol = NULL;
    *found = symbol;
    if (status) *status = symbol ? 0 : 1;
    return symbol ? SUCCESS : NOT_FOUND;
}
int cuGetProcAddress(const char* name, void** found, int version, word flags) {
    return cuGetProcAddress_v2(name, found, version, flags, NULL);
}

// ---- for tests ---------------------------------------------------------------------------------

void fake_reset(word seed, word pause_us, word bandwidth) {
    pthread_mutex_lock(&lock);
    if (now.lost) {  // all was lost with it
        num_live = 0;
        memset(defaults, 0, sizeof defaults);
        memset(engines, 0, sizeof engines);
        modules = 0;
    }
    memset(&now, 0, sizeof now);
    memset(counts, 0, sizeof counts);
    now.version = 13000, now.devices = DEVICES;
    now.device_memory = (word)4 << 30, now.pinnable = (word)8 << 30;
    now.seed = seed * 2654435761u + 88172645463325252u;
    now.pause_us = pause_us, now.bandwidth = bandwidth;
    pthread_mutex_unlock(&lock);
}
void fake_set(const char* what, word value) {
    pthread_mutex_lock(&lock);
    if (!strcmp(what, "version")) now.version = (int)value;
    if (!strcmp(what, "devices")) now.devices = (int)value;
    if (!strcmp(what, "device_memory")) now.device_memory = value;
    if (!strcmp(what, "pinnable")) now.pinnable = value;
    if (!strcmp(what, "capturing")) now.capturing = (int)value, now.spoiled = 0;
    if (!strcmp(what, "break_in")) now.break_in = value;  // that piece of work faults, and the context is lost
    pthread_mutex_unlock(&lock);
}
void fake_fail(const char* name, int nth, int code) {  // the nth call of that name from now fails
    pthread_mutex_lock(&lock);
    snprintf(now.fail, sizeof now.fail, "%s", name);
    now.fail_in = nth, now.fail_code = code;
    pthread_mutex_unlock(&lock);
}
long fake_calls(const char* name) {
    long calls = 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < 128 && counts[i].name; i++) if (!strcmp(counts[i].name, name)) calls = counts[i].calls;
    pthread_mutex_unlock(&lock);
    return calls;
}
long fake_left(const char* what) {  // what has not been given back
    long left = 0;
    pthread_mutex_lock(&lock);
    if (!strcmp(what, "handles")) left = num_live - (defaults[0] != NULL) - (defaults[1] != NULL);
    if (!strcmp(what, "ranges")) left = num_ranges;
    if (!strcmp(what, "references")) for (int i = 0; i < DEVICES; i++) left += contexts[i].references;
    if (!strcmp(what, "modules")) left = modules;
    if (!strcmp(what, "spoiled")) left = now.spoiled;
    pthread_mutex_unlock(&lock);
    return left;
}
