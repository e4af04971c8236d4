/* The least that drives llama.cpp: a prompt, then greedy tokens, one a call. For benchmarks/harness_overhead.py.

   Usage: minimal_llama MODEL.gguf THREADS CONTEXT
   Input:  one line a round: GENERATED COUNT ID ID ...   (COUNT ids of the prompt)
   Output: one line a round: WALL CPU ID ID ...          (seconds of decoding, the GENERATED ids after the first) */

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "llama.h"

static double seconds(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return now.tv_sec + 1e-9 * now.tv_nsec;
}

static void quiet(enum ggml_log_level level, const char *text, void *data) {
    (void)data;
    if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
}

static llama_token likeliest(struct llama_context *context, int vocabulary) {
    const float *logits = llama_get_logits_ith(context, -1);
    int best = 0;
    for (int token = 1; token < vocabulary; token++)
        if (logits[token] > logits[best]) best = token;
    return best;
}

static void decode(struct llama_context *context, llama_token *tokens, int count) {
    if (llama_decode(context, llama_batch_get_one(tokens, count)) != 0) exit(3);
}

int main(int argc, char **argv) {
    if (argc != 4) return 2;
    llama_log_set(quiet, NULL);
    llama_backend_init();
    struct llama_model_params model_parameters = llama_model_default_params();
    model_parameters.n_gpu_layers = 0;
    struct llama_model *model = llama_model_load_from_file(argv[1], model_parameters);
    if (!model) return 3;
    struct llama_context_params parameters = llama_context_default_params();
    parameters.n_threads = parameters.n_threads_batch = atoi(argv[2]);
    parameters.n_ctx = atoi(argv[3]);
    parameters.n_batch = parameters.n_ubatch = 512;
    struct llama_context *context = llama_init_from_model(model, parameters);
    if (!context) return 3;
    int vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
    int generated, count;
    while (scanf("%d %d", &generated, &count) == 2) {
        llama_token *prompt = malloc(sizeof *prompt * count), *answer = malloc(sizeof *answer * generated);
        for (int place = 0; place < count; place++)
            if (scanf("%d", &prompt[place]) != 1) return 2;
        llama_memory_clear(llama_get_memory(context), true);
        decode(context, prompt, count);
        llama_token token = likeliest(context, vocabulary);
        double wall = seconds(CLOCK_MONOTONIC), cpu = seconds(CLOCK_PROCESS_CPUTIME_ID);
        for (int place = 0; place < generated; place++) {
            decode(context, &token, 1);
            answer[place] = token = likeliest(context, vocabulary);
        }
        wall = seconds(CLOCK_MONOTONIC) - wall, cpu = seconds(CLOCK_PROCESS_CPUTIME_ID) - cpu;
        printf("%.9f %.9f", wall, cpu);
        for (int place = 0; place < generated; place++) printf(" %d", answer[place]);
        printf("\n");
        fflush(stdout);
        free(prompt), free(answer);
    }
    llama_free(context);
    llama_model_free(model);
    return 0;
}
