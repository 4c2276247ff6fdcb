#include "turboquant/spec/kv_spec.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <optional>
#include <set>
#include <stdexcept>
#include <utility>

#include "turboquant/spec/channel_scales.h"

namespace turboquant {
namespace {

constexpr std::array<std::pair<std::string_view, NormMode>, 3> kNormModes = {
    {{"plain", NormMode::plain}, {"corrected", NormMode::corrected}, {"eden", NormMode::eden}}};
/// 0.1.0's word for plain, in its plans: that of a format, too.
constexpr std::string_view kOldPlain = "raw";
constexpr int kMaxWindow = 1 << 16;
constexpr std::string_view kResidualForm = ":4";
static_assert(kResidualBits == 4);
constexpr std::array<std::pair<std::string_view, bool>, 2> kSwitch = {{{"on", true}, {"off", false}}};

CodecId codec_word(std::string_view word) {
    if (const auto id = find_codec(word)) return *id;
    throw std::invalid_argument("unknown KV format '" + std::string(word) + "'; known: " + known_codec_words() +
                                ", or k=WORD,v=WORD with k<LAYER>=WORD, v<LAYER>=WORD, offset=on|off, norm=plain|corrected|eden, "
                                "outlier=RATIO, sink=N, recent=N[:4]");
}

/// One word, or one per KV head.
HeadCodecs codec_words(std::string_view text) { return text.find('/') == text.npos ? codec_word(text) : parse_head_codecs(text); }

template <class Table>
auto choice(std::string_view key, std::string_view word, const Table& table) {
    std::string known;
    for (const auto& [name, value] : table) {
        if (name == word) return value;
        known += (known.empty() ? "" : ", ") + std::string(name);
    }
    throw std::invalid_argument("unknown value '" + std::string(word) + "' of " + std::string(key) + "; known: " + known);
}

float ratio(std::string_view word) {
    float r = 0;
    const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), r);
    if (error != std::errc() || end != word.data() + word.size() || !(r >= 1 && r <= 1000))
        throw std::invalid_argument("outlier=" + std::string(word) +
                                    ": the ratio to the median RMS is a number between 1 and 1000; known to work: 3");
    return r;
}

/// `as` in brackets: what may stand after the number.
int window(std::string_view key, std::string_view word, std::string_view number, const char* as) {
    int n = -1;
    const auto [end, error] = std::from_chars(number.data(), number.data() + number.size(), n);
    if (error != std::errc() || end != number.data() + number.size() || n < 0 || n > kMaxWindow)
        throw std::invalid_argument(std::string(key) + "=" + std::string(word) + ": tokens to keep exact; known: numbers from 0 to " +
                                    std::to_string(kMaxWindow) + as);
    return n;
}

/// N: fp16. N:4: that many bits on top of codes.
void recent_window(std::string_view word, WindowSizes& windows) {
    const bool residual = word.ends_with(kResidualForm);
    windows.recent = window("recent", word, word.substr(0, word.size() - (residual ? kResidualForm.size() : 0)),
                            ", and N:4 for 4 bits on top of their codes instead of fp16 values");
    windows.form = residual ? WindowForm::residual : WindowForm::halves;
}

/// Layer number of a key like "k12", for what = "k"; nullopt if it is not of that form.
std::optional<int> layer_of(std::string_view key, std::string_view what) {
    constexpr std::size_t kDigits = 4;
    int layer = -1;
    if (!key.starts_with(what) || key.size() == what.size() || key.size() > what.size() + kDigits) return std::nullopt;
    const auto [end, error] = std::from_chars(key.data() + what.size(), key.data() + key.size(), layer);
    return error == std::errc() && end == key.data() + key.size() && layer >= 0 ? std::optional(layer) : std::nullopt;
}

/// KEY=WORD, or WORD alone.
struct Item {
    std::string_view key, word;
};

/// Calls f for each of the items, which commas part.
template <class F>
void for_each_item(std::string_view text, F&& f) {
    for (std::size_t at = 0; at <= text.size();) {
        const std::size_t comma = std::min(text.find(',', at), text.size());
        const std::string_view item = text.substr(at, comma - at);
        at = comma + 1;
        const std::size_t eq = item.find('=');
        f(eq == item.npos ? Item{{}, item} : Item{item.substr(0, eq), item.substr(eq + 1)});
    }
}

constexpr const char* kKnownOptions = "offset, norm, outlier, sink, recent";

/// Throws std::invalid_argument if codes of some compressed layer cannot have the bits on top of them that were asked for.
void check_residuals(const KvSpec& spec) {
    if (const auto layer = spec.layer_without_residuals())
        throw std::invalid_argument(
            "recent=N:4: bits on top of codes need formats with one scale per vector on both sides (turbo, tcq), "
            "and " +
            (*layer < 0 ? "these are others" : "layer " + std::to_string(*layer) + " has others") + "; write recent=N");
}

/// Takes in an item that is an option; false if it is none.
bool take_option(SpecOptions& options, const Item& item) {
    if (item.key == "offset")
        options.offset = choice(item.key, item.word, kSwitch);
    else if (item.key == "norm")
        options.norm_mode = choice(item.key, item.word == kOldPlain ? "plain" : item.word, kNormModes);
    else if (item.key == "outlier")
        options.outlier_ratio = ratio(item.word);
    else if (item.key == "sink")
        options.windows.sink = window(item.key, item.word, item.word, "");
    else if (item.key == "recent")
        recent_window(item.word, options.windows);
    else
        return false;
    return true;
}

}  // namespace

HeadCodecs KvSpec::codecs(Side side, int layer) const {
    const auto& exceptions = side == Side::key ? k_layers : v_layers;
    const auto found = exceptions.find(layer);
    return found != exceptions.end() ? found->second : HeadCodecs(side == Side::key ? k : v);
}

std::optional<int> KvSpec::layer_without_residuals() const {
    std::set<int> layers = {-1};
    for (const auto& [layer, codecs] : k_layers) layers.insert(layer);
    for (const auto& [layer, codecs] : v_layers) layers.insert(layer);
    const auto without = [&](int layer) { return compressed(layer) && !takes_residuals(layer); };
    const auto found = std::ranges::find_if(layers, without);
    return found != layers.end() ? std::optional(*found) : std::nullopt;
}

bool KvSpec::takes_residuals(int layer) const {
    const auto all_mix = [](const HeadCodecs& c) {
        for (int h = 0; h < c.count(); h++)
            if (!mixes(c.of(h))) return false;
        return true;
    };
    return all_mix(codecs(Side::key, layer)) && all_mix(codecs(Side::value, layer));
}

KvSpec uniform_spec(CodecId k, CodecId v, const SpecOptions& options) {
    KvSpec spec;
    spec.options() = options;
    spec.k = k, spec.v = v;
    return spec;
}

KvSpec parse_kv_spec(std::string_view text) {
    KvSpec spec;
    bool have_k = false, have_v = false;
    if (text.empty()) throw std::invalid_argument("empty KV format; known: " + known_codec_words());
    for_each_item(text, [&](const Item& item) {
        const auto& [key, word] = item;
        if (key.empty()) {
            const CodecId id = codec_word(word);
            if (have_k || have_v)
                throw std::invalid_argument("KV format '" + std::string(text) + "': '" + std::string(word) +
                                            "' would replace what stands before it; for keys and values apart write k=WORD,v=WORD");
            spec.k = spec.v = id, have_k = have_v = true;
        } else if (key == "k")
            spec.k = codec_word(word), have_k = true;
        else if (key == "v")
            spec.v = codec_word(word), have_v = true;
        else if (const auto k_layer = layer_of(key, "k"))
            spec.k_layers.insert_or_assign(*k_layer, codec_words(word));
        else if (const auto v_layer = layer_of(key, "v"))
            spec.v_layers.insert_or_assign(*v_layer, codec_words(word));
        else if (const auto scaled = layer_of(key, "scale")) {
            parse_scales(word);
            spec.k_scales[*scaled] = word;
        } else if (!take_option(spec, item))
            throw std::invalid_argument("unknown key '" + std::string(key) + "' in KV format '" + std::string(text) +
                                        "'; known: k, v, k<LAYER>, v<LAYER>, scale<LAYER>, " + kKnownOptions);
    });
    if (!spec.offset && !spec.k_scales.empty())
        throw std::invalid_argument("key channels are scaled only where the key offset is removed; take out offset=off or the scales");
    if (spec.windows.residual()) check_residuals(spec);
    if (!have_k || !have_v)
        throw std::invalid_argument("KV format '" + std::string(text) + "' names only one side; give both: k=WORD,v=WORD");
    return spec;
}

SpecOptions parse_spec_options(std::string_view text) {
    SpecOptions options;
    if (text.empty()) return options;
    for_each_item(text, [&](const Item& item) {
        if (!take_option(options, item))
            throw std::invalid_argument("'" + std::string(item.key.empty() ? item.word : item.key) + "' in '" + std::string(text) +
                                        "' is no option that holds for all layers; known: " + kKnownOptions);
    });
    return options;
}

std::string to_string(const SpecOptions& options) {
    std::string out;
    const auto add = [&out](const std::string& item) { out += (out.empty() ? "" : ",") + item; };
    if (!options.offset) add("offset=off");
    if (options.outlier_ratio != kOutlierRatio) {
        std::array<char, 32> text;
        add("outlier=" + std::string(text.data(), std::to_chars(text.data(), text.data() + text.size(), options.outlier_ratio).ptr));
    }
    for (const auto& [word, mode] : kNormModes)
        if (mode == options.norm_mode) add("norm=" + std::string(word));
    if (const std::string windows = to_string(options.windows); !windows.empty()) add(windows);
    return out;
}

std::string to_string(const WindowSizes& w) {
    std::string out;
    if (w.sink != WindowSizes::kAuto) out.append("sink=").append(std::to_string(w.sink));
    if (w.recent == WindowSizes::kAuto) return out;
    out.append(out.empty() ? "recent=" : ",recent=").append(std::to_string(w.recent));
    if (w.residual()) out.append(kResidualForm);
    return out;
}

std::string to_string(const KvSpec& spec) {
    const auto name = [](CodecId id) { return std::string(codec_info(id).name); };
    const bool layered = !spec.k_layers.empty() || !spec.v_layers.empty();
    std::string out = spec.k == spec.v && !layered ? name(spec.k) : "k=" + name(spec.k) + ",v=" + name(spec.v);
    for (const auto& [layer, codecs] : spec.k_layers) out += ",k" + std::to_string(layer) + "=" + to_string(codecs);
    for (const auto& [layer, codecs] : spec.v_layers) out += ",v" + std::to_string(layer) + "=" + to_string(codecs);
    if (const std::string options = to_string(spec.options()); !options.empty()) out += "," + options;
    for (const auto& [layer, letters] : spec.k_scales) out += ",scale" + std::to_string(layer) + "=" + letters;
    return out;
}

std::string brief_text(KvSpec spec) {
    const bool scaled = !spec.k_scales.empty();
    spec.k_scales.clear();
    return to_string(spec) + (scaled ? ", key channels scaled" : "");
}

}  // namespace turboquant
