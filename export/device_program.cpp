// Runs a GGUF file on a device without Python: measures it, or ranks given tokens. Built by
// export/device_program.py; one JSON object on standard output, a sentence on standard error when it fails.
//
//   device_program benchmark MODEL TEXT_FILE THREADS GENERATED REPETITIONS
//     TEXT_FILE: the prompt as text. One round warms up. A round empties the cache, runs the prompt and decodes
//     GENERATED tokens greedily, one by one, after the first.
//     {"processors", "memory_bytes", "system", "weights_in", "threads", "load_s", "prompt_tokens", "ttft_s": [...],
//      "decode_s": [...], "peak_rss_bytes"}
//
//   device_program rank MODEL IDS_FILE THREADS
//     IDS_FILE: token ids, separated by blanks. After each of them, in order:
//     {"system", "top": [id of the most likely next token], "top_logit": [its logit]}
//
// Exit status: 2 for wrong arguments, 3 for a file that llama.cpp refuses or cannot run.

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

#include <unistd.h>

#include "llama.h"

namespace {

constexpr int BATCH = 512;
std::vector<std::string> buffers;

double now() {
    using namespace std::chrono;
    return duration<double>(steady_clock::now().time_since_epoch()).count();
}

[[noreturn]] void fail(int status, const std::string & sentence) {
    std::fprintf(stderr, "%s\n", sentence.c_str());
    std::exit(status);
}

// Keeps errors, and where the weights went: "load_tensors:   CPU_REPACK model buffer size =    60.20 MiB".
void listen(ggml_log_level level, const char * text, void *) {
    if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
    const std::string line = text;
    const size_t size = line.find("model buffer size =");
    const size_t name = line.find(':');
    if (size == std::string::npos || name == std::string::npos) return;
    std::istringstream words(line.substr(name + 1, size - name - 1) + line.substr(size + 19));
    std::string place, word;
    while (words >> word) place += (place.empty() ? "" : " ") + word;
    buffers.push_back(place);
}

std::string read_file(const char * path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) fail(2, std::string(path) + ": cannot be read.");
    return {std::istreambuf_iterator<char>(file), {}};
}

int whole_number(const char * text) {
    const int value = std::atoi(text);
    if (value < 1) fail(2, std::string(text) + ": is no whole number above 0.");
    return value;
}

std::string quoted(const std::string & text) {
    std::string out = "\"";
    for (const char letter : text) {
        if (letter == '"' || letter == '\\') out += '\\';
        out += static_cast<unsigned char>(letter) < 0x20 ? ' ' : letter;
    }
    return out + '"';
}

template <typename Values> void print_list(const char * name, const Values & values, const char * format) {
    std::printf(", \"%s\": [", name);
    for (size_t place = 0; place < values.size(); place++) {
        if (place) std::printf(", ");
        std::printf(format, values[place]);
    }
    std::printf("]");
}

long peak_resident_bytes() {
    std::ifstream status("/proc/self/status");
    std::string line;
    while (std::getline(status, line))
        if (line.rfind("VmHWM:", 0) == 0) return std::atol(line.c_str() + 6) * 1024;
    return 0;
}

struct Model {
    llama_model * model;
    llama_context * context = nullptr;
    int vocabulary;

    Model(const char * path) {
        llama_model_params parameters = llama_model_default_params();
        parameters.n_gpu_layers = 0;
        model = llama_model_load_from_file(path, parameters);
        if (!model) fail(3, "llama.cpp cannot load the file.");
        vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
    }

    void make_context(int length, int threads) {
        llama_context_params parameters = llama_context_default_params();
        parameters.n_threads = parameters.n_threads_batch = threads;
        parameters.n_ctx = length;
        parameters.n_batch = parameters.n_ubatch = BATCH;
        context = llama_init_from_model(model, parameters);
        if (!context) fail(3, "llama.cpp cannot make a context of " + std::to_string(length) + " tokens.");
    }

    void run(llama_token * tokens, int count) {
        for (int start = 0; start < count; start += BATCH) {
            const int part = count - start < BATCH ? count - start : BATCH;
            if (llama_decode(context, llama_batch_get_one(tokens + start, part)) != 0) fail(3, "llama.cpp cannot run the tokens.");
        }
    }

    // The most likely next token and its logit.
    std::pair<llama_token, float> top() const {
        const float * logits = llama_get_logits_ith(context, -1);
        int best = 0;
        for (int token = 1; token < vocabulary; token++)
            if (logits[token] > logits[best]) best = token;
        return {best, logits[best]};
    }
};

std::vector<llama_token> tokens_of(const Model & model, const std::string & text) {
    std::vector<llama_token> tokens(text.size() + 8);
    const llama_vocab * vocab = llama_model_get_vocab(model.model);
    const int count = llama_tokenize(vocab, text.data(), text.size(), tokens.data(), tokens.size(), true, false);
    if (count < 1) fail(3, "llama.cpp cannot turn the text into tokens.");
    tokens.resize(count);
    return tokens;
}

void benchmark(char ** arguments) {
    const std::string text = read_file(arguments[1]);
    const int threads = whole_number(arguments[2]);
    const int generated = whole_number(arguments[3]);
    const int repetitions = whole_number(arguments[4]);
    const double started = now();
    Model model(arguments[0]);
    std::vector<llama_token> prompt = tokens_of(model, text);
    model.make_context(prompt.size() + generated + 1, threads);
    const double load = now() - started;
    std::vector<double> first_token, decoding;
    for (int repetition = 0; repetition <= repetitions; repetition++) {
        llama_memory_clear(llama_get_memory(model.context), true);
        const double begun = now();
        model.run(prompt.data(), prompt.size());
        llama_token token = model.top().first;
        const double first = now();
        for (int place = 0; place < generated; place++) {
            model.run(&token, 1);
            token = model.top().first;
        }
        const double ended = now();
        if (repetition == 0) continue;
        first_token.push_back(first - begun);
        decoding.push_back(ended - first);
    }
    std::printf(
        "{\"processors\": %ld, \"memory_bytes\": %.0f, \"system\": %s", sysconf(_SC_NPROCESSORS_CONF),
        static_cast<double>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE), quoted(llama_print_system_info()).c_str());
    std::vector<std::string> places;
    for (const std::string & place : buffers) places.push_back(quoted(place));
    std::printf(", \"weights_in\": [");
    for (size_t place = 0; place < places.size(); place++) std::printf("%s%s", place ? ", " : "", places[place].c_str());
    std::printf(
        "], \"threads\": %d, \"load_s\": %.6f, \"prompt_tokens\": %zu, \"peak_rss_bytes\": %ld",
        llama_n_threads(model.context), load, prompt.size(), peak_resident_bytes());
    print_list("ttft_s", first_token, "%.6f");
    print_list("decode_s", decoding, "%.6f");
    std::printf("}\n");
}

void rank(char ** arguments) {
    std::istringstream listed(read_file(arguments[1]));
    std::vector<llama_token> ids{std::istream_iterator<llama_token>(listed), {}};
    if (ids.empty()) fail(2, std::string(arguments[1]) + ": holds no token ids.");
    Model model(arguments[0]);
    for (const llama_token id : ids)
        if (id < 0 || id >= model.vocabulary) fail(2, std::to_string(id) + ": is no token of the model.");
    model.make_context(ids.size() + 1, whole_number(arguments[2]));
    std::vector<llama_token> tops;
    std::vector<double> logits;
    for (llama_token & id : ids) {
        model.run(&id, 1);
        const auto [token, logit] = model.top();
        tops.push_back(token);
        logits.push_back(logit);
    }
    std::printf("{\"system\": %s", quoted(llama_print_system_info()).c_str());
    print_list("top", tops, "%d");
    print_list("top_logit", logits, "%.6f");
    std::printf("}\n");
}

}  // namespace

int main(int count, char ** arguments) {
    llama_log_set(listen, nullptr);
    llama_backend_init();
    const std::string what = count > 1 ? arguments[1] : "";
    if (what == "benchmark" && count == 7) benchmark(arguments + 2);
    else if (what == "rank" && count == 5) rank(arguments + 2);
    else fail(2, "usage: device_program benchmark MODEL TEXT_FILE THREADS GENERATED REPETITIONS | rank MODEL IDS_FILE THREADS");
    return 0;
}
