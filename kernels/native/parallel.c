/* Threads: those that PyTorch already keeps. No OpenMP runtime is linked; the entry points of the one that
   libtorch itself is bound to are handed over at load time, so there is never a second pool of threads. */
#include <stdlib.h>

#include "native.h"

typedef void (*parallel_function)(void (*body)(void *), void *data, unsigned threads, unsigned flags);
static parallel_function parallel;
static int (*thread_index)(void), (*thread_count)(void);

/* GOMP_parallel, omp_get_thread_num, omp_get_num_threads of torch's runtime; NULL for one thread. */
void set_runtime(void *gomp_parallel, void *get_thread_num, void *get_num_threads) {
    parallel = (parallel_function)gomp_parallel;
    thread_index = (int (*)(void))get_thread_num;
    thread_count = (int (*)(void))get_num_threads;
}

typedef struct {
    task_function task;
    const void *args;
    int64_t tasks, floats;
} job;

static void run_range(const job *j, int64_t first, int64_t stop) {
    float *scratch = NULL;
    if (j->floats && posix_memalign((void **)&scratch, 64, (size_t)j->floats * sizeof(float))) abort();
    for (int64_t i = first; i < stop; i++) j->task(j->args, i, scratch);
    free(scratch);
}

static void body(void *data) {
    const job *j = data;
    int64_t index = thread_index(), count = thread_count();
    run_range(j, j->tasks * index / count, j->tasks * (index + 1) / count);
}

void run_tasks(task_function task, const void *args, int64_t tasks, int64_t floats, int64_t threads) {
    job j = {task, args, tasks, floats};
    threads = smaller(threads, tasks);
    if (parallel && threads > 1) parallel(body, &j, (unsigned)threads, 0);
    else run_range(&j, 0, tasks);
}
