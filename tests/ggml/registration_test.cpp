// How the library presents itself: the registry, its devices, the extra procedures, the configuration variable, refusals.
#include <sys/wait.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>

#include "tests/ggml/support.h"
#include "tests/ggml/tiny_models.h"

namespace turboquant::conformance {
namespace {

TEST(Registration, OneDevicePerWordInOrder) {
    const ggml_backend_reg_t reg = plugin();
    EXPECT_STREQ(ggml_backend_reg_name(reg), "turboquant");
    std::vector<std::string> words(kFormats.begin(), kFormats.end());
    words.insert(words.end(), {"auto3", "auto2"});
    words.insert(on_gpu() ? words.end() - 2 : words.begin(), "auto4");
    ASSERT_EQ(ggml_backend_reg_dev_count(reg), words.size());
    for (size_t i = 0; i < words.size(); i++) {
        const ggml_backend_dev_t dev = ggml_backend_reg_dev_get(reg, i);
        EXPECT_EQ(ggml_backend_dev_name(dev), words[i]);
        EXPECT_EQ(dev, ggml_backend_dev_by_name(words[i].c_str()));
        EXPECT_EQ(ggml_backend_dev_backend_reg(dev), reg);
        EXPECT_EQ(ggml_backend_dev_type(dev), GGML_BACKEND_DEVICE_TYPE_GPU);
        ggml_backend_dev_props props;
        ggml_backend_dev_get_props(dev, &props);
        EXPECT_EQ(props.name, words[i]);
        ASSERT_TRUE(props.device_id);
        EXPECT_STREQ(props.device_id, "turboquant");  // the same for all: llama.cpp takes the first and skips the rest
        EXPECT_NE(std::string(ggml_backend_dev_description(dev)).find("TurboQuant"), std::string::npos);
        size_t free = 0, total = 0;
        ggml_backend_dev_memory(dev, &free, &total);
        EXPECT_GT(total, size_t{1} << 28);
        EXPECT_LE(free, total);
    }
}

TEST(Registration, BuffersAreNotHostMemoryButHostMemoryIsTaken) {
    for (const std::string& name : kFormats) {
        const ggml_backend_dev_t dev = device(name);
        const ggml_backend_buffer_type_t buft = ggml_backend_dev_buffer_type(dev);
        EXPECT_FALSE(ggml_backend_buft_is_host(buft)) << "the CPU would read compressed bytes as f16";
        EXPECT_EQ(ggml_backend_buft_get_device(buft), dev);
        EXPECT_TRUE(ggml_backend_dev_supports_buft(dev, buft));
        EXPECT_TRUE(ggml_backend_dev_supports_buft(dev, ggml_backend_cpu_buffer_type()));
        for (const std::string& other : kFormats)
            EXPECT_EQ(ggml_backend_dev_supports_buft(dev, ggml_backend_dev_buffer_type(device(other))), other == name);
    }
}

TEST(Registration, TakesAllOperationsOfAModelThatHasLayersHereAndNoneOfOthers) {
    const Owned<ggml_context> ctx(ggml_init({32 * ggml_tensor_overhead(), nullptr, true}));
    ggml_tensor* a = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, 64, 64);
    ggml_tensor* idx = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I64, 64);
    ggml_tensor* half = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F16, 64, 64);
    const std::vector<ggml_tensor*> ops = {ggml_mul_mat(ctx.get(), a, a), ggml_add(ctx.get(), a, a),
                                           ggml_set_rows(ctx.get(), half, a, idx)};
    const ggml_backend_dev_t dev = procedure<turboquant_device_t>("turboquant_device")("turbo4,sink=1,recent=5", nullptr, 0);
    for (ggml_tensor* op : ops) EXPECT_FALSE(ggml_backend_dev_supports_op(dev, op)) << ggml_op_desc(op);
    EXPECT_TRUE(ggml_backend_dev_supports_op(dev, ggml_view_1d(ctx.get(), a, 64, 0)));
    take_log();
    const ModelPtr model = load_model(TQ_DEMO_MODEL, "turbo4,sink=1,recent=5");
    EXPECT_EQ(take_log().find("sink=1,recent=5 model buffer size"), std::string::npos) << "weights are the CPU's";
    for (ggml_tensor* op : ops) EXPECT_TRUE(ggml_backend_dev_supports_op(dev, op)) << ggml_op_desc(op);
}

TEST(Registration, APlainGraphIsOneSplit) {
    const ModelPtr model = load_model(TQ_DEMO_MODEL, "turbo4");
    take_log();
    const ContextPtr ctx = make_context(model.get());
    const std::string log = take_log();
    EXPECT_NE(log.find("splits = 1"), std::string::npos) << log;
    EXPECT_EQ(log.find("splits = 1", log.find("splits = 1")), log.find("splits = 1,")) << "not 13: " << log;
}

TEST(Registration, LoadsTwiceWithoutHarm) {
    const ggml_backend_reg_t first = plugin();
    const ggml_backend_dev_t dev = device("turbo4");
    const ggml_backend_reg_t second = ggml_backend_load(TQ_PLUGIN_PATH);
    EXPECT_TRUE(second == first || second == nullptr);
    EXPECT_EQ(device("turbo4"), dev);
    EXPECT_EQ(ggml_backend_reg_dev_count(first), kFormats.size() + 3);
    const ContextPtr ctx = make_context(demo("turbo4"));
    EXPECT_GT(decode(ctx.get(), text_tokens(demo("turbo4"), 8)).rows(), 0);
}

TEST(Registration, OneModelServesCachesOfManySpecs) {
    const auto make = procedure<turboquant_new_device_t>("turboquant_new_device");
    const auto set_spec = procedure<turboquant_set_spec_t>("turboquant_set_spec");
    const auto stats_of = procedure<turboquant_kv_stats_t>("turboquant_kv_stats");
    const ggml_backend_dev_t dev = make();
    EXPECT_NE(make(), dev) << "nobody else gets it";
    ggml_backend_dev_t devices[] = {dev, nullptr};
    llama_model_params params = llama_model_default_params();
    params.devices = devices;
    const ModelPtr model(llama_model_load_from_file(TQ_DEMO_MODEL, params));
    ASSERT_TRUE(model);
    const std::vector<llama_token> tokens = text_tokens(model.get(), 80);
    const auto bits = [&](const char* spec) {
        EXPECT_TRUE(set_spec(dev, spec, nullptr, 0)) << spec;
        const ContextPtr ctx = make_context(model.get());
        EXPECT_GT(decode(ctx.get(), tokens).rows(), 0);
        turboquant_kv_stats stats;
        stats_of(dev, &stats);
        return stats.bits_per_value;
    };
    const double first = bits("turbo4");
    EXPECT_LT(bits("turbo3,sink=0,recent=0"), first - 0.9);
    EXPECT_NEAR(bits("turbo4"), first, 1e-9);
    EXPECT_LE(bits("auto:4.25"), 4.25);
    // A cache that exists keeps its formats.
    EXPECT_TRUE(set_spec(dev, "turbo4", nullptr, 0));
    const ContextPtr ctx = make_context(model.get());
    EXPECT_TRUE(set_spec(dev, "turbo2", nullptr, 0));
    EXPECT_GT(decode(ctx.get(), tokens).rows(), 0);
    turboquant_kv_stats stats;
    stats_of(dev, &stats);
    EXPECT_NEAR(stats.bits_per_value, first, 1e-9);
    char error[128] = "";
    EXPECT_FALSE(set_spec(dev, "turbo9", error, sizeof error));
    EXPECT_NE(std::string(error).find("turbo9"), std::string::npos) << error;
    EXPECT_FALSE(set_spec(device("turbo4"), "turbo3", error, sizeof error)) << "others use that one";
}

TEST(Registration, DevicesOfOnesOwnAreWhereOneSays) {
    const auto make = procedure<turboquant_new_device_at_t>("turboquant_new_device_at");
    const auto place = procedure<turboquant_place_t>("turboquant_place");
    char error[256] = "";
    const ggml_backend_dev_t usual = make("", error, sizeof error), cpu = make("cpu", error, sizeof error);
    ASSERT_TRUE(usual && cpu) << error;
    const std::string at_usual = place(usual), at_cpu = place(cpu);  // a text is good until the next call
    if (on_gpu()) {
        EXPECT_EQ(at_cpu, "CPU");
        EXPECT_NE(at_usual, "CPU");
    } else {
        EXPECT_EQ(at_cpu.substr(0, 5), "CPU (") << "and why";
        EXPECT_EQ(at_usual, at_cpu);
    }
    // llama.cpp tells buffer types apart by name.
    if (on_gpu()) {
        EXPECT_STRNE(ggml_backend_dev_name(cpu), ggml_backend_dev_name(usual));
    }
    EXPECT_FALSE(make("cuda99", error, sizeof error));
    EXPECT_NE(std::string(error).find("cuda99"), std::string::npos) << error;
}

TEST(Registration, ADeviceOfOnesOwnHasLlamasCachesToo) {
    const ggml_backend_dev_t dev = procedure<turboquant_new_device_t>("turboquant_new_device")();
    const auto set_spec = procedure<turboquant_set_spec_t>("turboquant_set_spec");
    ggml_backend_dev_t devices[] = {dev, nullptr};
    llama_model_params params = llama_model_default_params();
    params.devices = devices;
    const ModelPtr model(llama_model_load_from_file(TQ_DEMO_MODEL, params));
    ASSERT_TRUE(model);
    const std::vector<llama_token> tokens = text_tokens(model.get(), 80);
    const auto logits = [&](const char* spec, ggml_type type) {
        EXPECT_TRUE(set_spec(dev, spec, nullptr, 0));
        llama_context_params p = llama_context_default_params();
        p.n_ctx = 256, p.type_k = p.type_v = type, p.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
        const ContextPtr ctx(llama_init_from_model(model.get(), p));
        EXPECT_TRUE(ctx) << spec;
        turboquant_kv_stats stats;
        procedure<turboquant_kv_stats_t>("turboquant_kv_stats")(dev, &stats);
        EXPECT_EQ(stats.n_tensors, spec ? 12u : 0u);
        return decode(ctx.get(), tokens);
    };
    const ContextPtr plain = make_context(demo("f16"), {.n_ctx = 256});
    const Logits f16 = decode(plain.get(), tokens);
    EXPECT_LT(mean_kld(f16, logits(nullptr, GGML_TYPE_F16)), 1e-5);
    const double q4 = mean_kld(f16, logits(nullptr, GGML_TYPE_Q4_0));
    EXPECT_GT(q4, 1e-3);
    EXPECT_LT(q4, 0.5);
    EXPECT_GT(mean_kld(f16, logits("turbo2", GGML_TYPE_F16)), 1e-3) << "and compressed ones again";
}

TEST(Registration, AnySpecHasADevice) {
    const auto get = procedure<turboquant_device_t>("turboquant_device");
    ASSERT_TRUE(get);
    char error[512] = "";
    EXPECT_EQ(get("turbo4", error, sizeof error), device("turbo4"));
    const ggml_backend_dev_t mixed = get("k=turbo4,v=turbo2", error, sizeof error);
    ASSERT_TRUE(mixed) << error;
    EXPECT_EQ(get("k=turbo4,v=turbo2", nullptr, 0), mixed);
    EXPECT_EQ(ggml_backend_reg_dev_count(plugin()), kFormats.size() + 3) << "not listed: llama.cpp would offer it";
    const std::string config = procedure<turboquant_config_t>("turboquant_config")(mixed);
    EXPECT_NE(config.find("turbo4"), std::string::npos) << config;
    EXPECT_NE(config.find("turbo2"), std::string::npos) << config;
}

TEST(Registration, WrongSpecsAreRefusedWithTheWordsKnown) {
    const auto get = procedure<turboquant_device_t>("turboquant_device");
    for (const char* bad :
         {"turbo9", "", "k=turbo4", "k=turbo4,v=", "k=q8_0,v=turbo4", "f16", "turbo4,turbo3", "=", ",", "k=turbo4,v=turbo4,x=1"}) {
        char error[512] = "";
        EXPECT_EQ(get(bad, error, sizeof error), nullptr) << bad;
        EXPECT_NE(std::string(error), "") << bad;
        EXPECT_EQ(get(bad, nullptr, 0), nullptr) << bad;
    }
    char error[512] = "", few[8];
    get("turbo9", error, sizeof error);
    EXPECT_NE(std::string(error).find("turbo9"), std::string::npos) << error;
    for (const std::string& name : kFormats) EXPECT_NE(std::string(error).find(name), std::string::npos) << error;
    std::memset(few, 'x', sizeof few);
    get("turbo9", few, sizeof few);
    EXPECT_EQ(few[sizeof few - 1], '\0');
    EXPECT_EQ(get(nullptr, error, sizeof error), nullptr);
    EXPECT_EQ(ggml_backend_reg_get_proc_address(plugin(), "no_such_procedure"), nullptr);
}

/// The configuration variable is read when the library is loaded: in processes of their own.
struct Probe {
    int exit_code;
    std::string text;
};
Probe probe(const std::string& setting, const std::string& device_name) {
    const std::string out = temp_path("probe");
    const int status = std::system(
        (setting + " '" TQ_CONFIG_PROBE "' '" TQ_PLUGIN_PATH "' '" TQ_DEMO_MODEL "' " + device_name + " >'" + out + "' 2>&1").c_str());
    std::ostringstream text;
    text << std::ifstream(out).rdbuf();
    return {WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status), text.str()};
}

TEST(Configuration, VariableMakesTheFirstDevice) {
    const Probe plain = probe("", "default");
    ASSERT_EQ(plain.exit_code, 0) << plain.text;
    EXPECT_NE(plain.text.find("first device auto4\n"), std::string::npos) << plain.text;
    EXPECT_NE(plain.text.find("bits 4."), std::string::npos) << plain.text;

    const Probe mixed = probe("TURBOQUANT_KV=k=turbo4,v=turbo2", "default");
    ASSERT_EQ(mixed.exit_code, 0) << mixed.text;
    EXPECT_NE(mixed.text.find("first device turboquant\n"), std::string::npos) << mixed.text;
    EXPECT_NE(mixed.text.find("keys turbo4, values turbo2"), std::string::npos) << mixed.text;
    EXPECT_NE(mixed.text.find("bits 3."), std::string::npos) << mixed.text;

    const Probe named = probe("TURBOQUANT_KV=turbo8", "turbo3");
    ASSERT_EQ(named.exit_code, 0) << named.text;
    EXPECT_NE(named.text.find("bits 3."), std::string::npos) << "a device named in so many words is that device: " << named.text;
}

/// A plan for the demo model with the given layers.
std::string plan_file(const std::string& layers) {
    const std::string path = temp_path("plan") + ".json";
    std::ofstream(path) << R"({"turboquant_plan": 1, "model": {"hash": "0", "name": "its-own-model"}, "layers": [)" << layers << "]}";
    return path;
}
std::string plan_layers(int n) {
    std::string layers;
    for (int l = 0; l < n; l++)
        layers += (l ? ", " : "") + std::string(R"({"layer": )") + std::to_string(l) +
                  (l == 3 ? R"(, "k": "turbo8", "v": "tcq2"})" : R"(, "k": "tcq3", "v": "tcq2"})");
    return layers;
}

TEST(Configuration, PlanFileSetsTheFormatsOfEveryLayer) {
    const Probe p = probe("TURBOQUANT_KV=" + plan_file(plan_layers(6)), "default");
    ASSERT_EQ(p.exit_code, 0) << p.text;
    EXPECT_NE(p.text.find("first device turboquant\n"), std::string::npos) << p.text;
    EXPECT_NE(p.text.find("k=tcq3,v=tcq2,k3=turbo8"), std::string::npos) << p.text;
    EXPECT_NE(p.text.find("bits 3.261 "), std::string::npos)
        << "(5*3 + 8 + 6*2)/12 + 1/4 + positions + what fits into 1/16 for the exact windows: " << p.text;
}

TEST(Configuration, PlanScalesKeyChannels) {
    const auto scaled = [](const std::string& letters) {
        std::string layers = plan_layers(6);
        return layers.insert(layers.find("\"k\""), "\"k_scales\": \"" + letters + "\", ");
    };
    const std::string even = std::string(64, 'b') + std::string(64, 'Y');
    const Probe good = probe("TURBOQUANT_KV=" + plan_file(scaled(even)), "default");
    EXPECT_EQ(good.exit_code, 0) << good.text;
    EXPECT_NE(good.text.find("key channels scaled"), std::string::npos) << good.text;
    std::string uneven = even;
    uneven[5] = 'c';
    for (const auto& [letters, cause] : {std::pair(even.substr(1), "127"), std::pair(uneven, "differently")}) {
        const Probe bad = probe("TURBOQUANT_KV=" + plan_file(scaled(letters)), "default");
        EXPECT_EQ(bad.exit_code, 1) << bad.text;
        EXPECT_NE(bad.text.find(cause), std::string::npos) << bad.text;
    }
}

TEST(Configuration, PlanNamesFormatsPerHead) {
    const auto with = [](const std::string& words) {
        std::string layers = plan_layers(6);
        return "TURBOQUANT_KV=" + plan_file(layers.replace(layers.find("turbo8"), 6, words));
    };
    const Probe good = probe(with("turbo8/tcq2"), "default");
    ASSERT_EQ(good.exit_code, 0) << good.text;
    EXPECT_NE(good.text.find("k3=turbo8/tcq2"), std::string::npos) << good.text;
    EXPECT_NE(good.text.find("bits 3.011 "), std::string::npos) << "3 bits less for one side of a layer, of 12: " << good.text;
    const Probe bad = probe(with("turbo8/tcq2/tcq3"), "default");
    EXPECT_EQ(bad.exit_code, 1) << bad.text;
    for (const char* part : {"formats for 3 KV heads", "turbo8/tcq2/tcq3", "has 2"})
        EXPECT_NE(bad.text.find(part), std::string::npos) << part << " in " << bad.text;
}

TEST(Configuration, PlanOfAnotherModelIsRefused) {
    const struct {
        std::string layers, cause;
    } cases[] = {{plan_layers(5), "keys of layer 5 of this one"},
                 {plan_layers(7), "keys of layer 6, which this one does not have"},
                 {plan_layers(5) + R"(, {"layer": 5, "k": "tcq3", "v": null})", "values of layer 5"}};
    for (const auto& c : cases) {
        const Probe p = probe("TURBOQUANT_KV=" + plan_file(c.layers), "default");
        EXPECT_EQ(p.exit_code, 1) << p.text;
        EXPECT_NE(p.text.find("no context"), std::string::npos) << "where the cause is known: " << p.text;
        for (const std::string& part : {c.cause, std::string("its-own-model"), std::string("turboquant plan"), std::string("-devd")})
            EXPECT_NE(p.text.find(part), std::string::npos) << part << " in " << p.text;
    }
    const Probe missing = probe("TURBOQUANT_KV=/no/such/plan.json", "default");
    EXPECT_EQ(missing.exit_code, 3) << missing.text;
    EXPECT_NE(missing.text.find("/no/such/plan.json"), std::string::npos) << missing.text;
}

TEST(Configuration, AutoChoosesWithinTheBudgetAndSaysWhat) {
    const Probe p = probe("TURBOQUANT_KV=auto:4.25,offset=off", "default");
    ASSERT_EQ(p.exit_code, 0) << p.text;
    EXPECT_NE(p.text.find("without measurements: k=tcq"), std::string::npos) << p.text;
    EXPECT_NE(p.text.find("turboquant plan"), std::string::npos) << p.text;
    const double bits = std::atof(p.text.c_str() + p.text.rfind("bits ") + 5);
    EXPECT_LE(bits, 4.25) << "positions and scales counted: " << p.text;
    EXPECT_GT(bits, 4.25 - 1.0 / 12) << "one more bit for one side of a layer would fit: " << p.text;

    const Probe small = probe("TURBOQUANT_KV=auto:1.2", "default");
    EXPECT_EQ(small.exit_code, 1) << small.text;
    EXPECT_NE(small.text.find("below what the smallest formats take, 1.250"), std::string::npos) << small.text;
    const Probe memory = probe("TURBOQUANT_KV=auto:512MiB", "default");
    EXPECT_EQ(memory.exit_code, 3) << memory.text;
    EXPECT_NE(memory.text.find("--memory"), std::string::npos) << memory.text;
}

/// llama.cpp keeps the layers with sliding windows in a cache of their own: what the other layers get is weighed against it all the same.
TEST(Configuration, AutoSharesOneBudgetAmongTheCachesOfAContext) {
    for (const TinyModel& tiny : tiny_models()) {
        if (tiny.name != "gemma3") continue;  // every second of four layers has global attention
        ASSERT_TRUE(plugin());
        ggml_backend_dev_t devices[] = {ggml_backend_dev_by_name("auto3"), nullptr};
        ASSERT_TRUE(devices[0]);
        llama_model_params params = llama_model_default_params();
        params.devices = devices;
        const ModelPtr model(llama_model_load_from_file(write_tiny_model(tiny, temp_path("")).c_str(), params));
        ASSERT_TRUE(model);
        const ContextPtr ctx = make_context(model.get(), {.n_ctx = 4096});
        decode(ctx.get(), random_tokens(kTinyVocab, 100, 3));
        turboquant_kv_stats stats;
        procedure<turboquant_kv_stats_t>("turboquant_kv_stats")(devices[0], &stats);
        EXPECT_LE(stats.bits_per_value, 3.25);
        EXPECT_GT(stats.bits_per_value, 3.25 - 4096. / (4 * (4096 + 768))) << "one more bit for one side of a layer would fit";
        const std::string config = procedure<turboquant_config_t>("turboquant_config")(devices[0]);
        const auto bits = [&](char side, int layer) {  // "k=tcq4,v=tcq3,k1=tcq5": the format's last digit
            size_t at = config.find(std::string(",") + side + std::to_string(layer) + "=tcq");
            if (at == std::string::npos) at = config.find(std::string(1, side) + "=tcq");
            return at == std::string::npos ? NAN : config[config.find("=tcq", at) + 4] - '0';
        };
        const double global = (bits('k', 1) + bits('k', 3)) / 2.0, sliding = (bits('k', 0) + bits('k', 2)) / 2.0;
        // Four layers count as shallow: keys as much as values, but 16 times as much where attention is global, in 5 times the cells.
        EXPECT_GE(global - sliding, 0) << config;
        EXPECT_GE(global - (bits('v', 1) + bits('v', 3)) / 2.0, 1) << config;
        EXPECT_LE(std::abs(sliding - (bits('v', 0) + bits('v', 2)) / 2.0), 1) << config;
    }
}

TEST(Configuration, BadValueIsRefusedAndSaysSo) {
    const Probe bad = probe("TURBOQUANT_KV=turbo9", "default");
    EXPECT_EQ(bad.exit_code, 3) << bad.text;  // the library does not load, the process goes on
    EXPECT_NE(bad.text.find("turbo9"), std::string::npos) << bad.text;
    EXPECT_NE(bad.text.find("turbo4"), std::string::npos) << "names the known words: " << bad.text;
    const Probe empty = probe("TURBOQUANT_KV=", "default");
    EXPECT_EQ(empty.exit_code, 0) << empty.text;
}

}  // namespace
}  // namespace turboquant::conformance
